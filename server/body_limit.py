"""A request's body has a largest size: beyond it a 413 that names the size, before anything is parsed."""

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

MIB = 1 << 20


class BodyLimit:
    """Middleware: a body that says that it is too large is not read; one that does not say is read up to the limit.

    The limit in bytes is ``app.state.score_body_limit`` once the server has started.

    Args:
        app: the next ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        most = None if scope["type"] != "http" else getattr(scope["app"].state, "score_body_limit", None)
        if most is None:
            await self.app(scope, receive, send)
            return
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if said.isdigit() and int(said) > most:
            await _refuse(most)(scope, receive, send)
            return
        read, begun = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _words(most))
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except HTTPException:
            # Raised below the handlers of routes: in another middleware that reads the body.
            if begun or read <= most:
                raise
            await _refuse(most)(scope, receive, send)


def _words(most: int) -> str:
    return (
        f"the body of the request is larger than {most} bytes, the most that this server takes (--max-body-mib "
        f"{most // MIB}); send long videos by URL"
    )


def _refuse(most: int) -> JSONResponse:
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    error = ErrorResponse(error=ErrorInfo(message=_words(most), type=status.phrase, code=status.value))
    return JSONResponse(error.model_dump(), status_code=status)
