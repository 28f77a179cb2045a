"""Routes that take neither our fields nor, some of them, videos: they say so, in a sentence."""

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from score_vllm.server import context
from score_vllm.server.content import EXPLAIN_FIELD, OWN_FIELDS, has_video

CHAT_PATH = "/v1/chat/completions"
TOKENIZE_PATH = "/tokenize"
UNCOUNTED_PATHS = frozenset({TOKENIZE_PATH, "/v1/messages/count_tokens"})
# Where vLLM takes pictures, but no video.
PICTURES_ONLY = {"/v1/responses": "input", "/v1/messages": "messages", "/v1/messages/count_tokens": "messages"}


class RefuseElsewhere:
    """Middleware: a field of ours that a route would ignore in silence, or a video it cannot take, is a 400.

    Args:
        app: the next ASGI application.
        paths: of the POST routes to look at; others pass untouched.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self.app = app
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        context.counts.set(path not in UNCOUNTED_PATHS)
        if path not in self.paths:
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        refusal = _refusal(path, b"".join(message.get("body", b"") for message in messages))
        if refusal is not None:
            error = create_error_response(refusal)
            await JSONResponse(error.model_dump(), status_code=error.error.code)(scope, receive, send)
            return
        replay = iter(messages)

        async def replayed() -> Message:
            return next(replay, None) or await receive()

        await self.app(scope, replayed, send)


def _refusal(path: str, body: bytes) -> VLLMValidationError | None:
    pictures = PICTURES_ONLY.get(path)
    # A cheap look first: bodies can be large. An escaped key needs a backslash-u, UTF-16 and UTF-32 a NUL.
    signs = [*(name.encode() for name in OWN_FIELDS), b"\\u", b"\0", *([b"video"] if pictures else [])]
    if not any(sign in body for sign in signs):
        return None
    try:
        parsed: Any = json.loads(body)
        if not isinstance(parsed, dict):
            return None
        nested = parsed.get("extra_body")
        for holder in (parsed, nested if isinstance(nested, dict) else {}):
            if (name := next((name for name in OWN_FIELDS if name in holder), None)) is not None:
                accepting = CHAT_PATH if name == EXPLAIN_FIELD else f"{CHAT_PATH} and {TOKENIZE_PATH}"
                return VLLMValidationError(f"{name} is supported on {accepting} only, not on {path}", parameter=name)
        if pictures is not None and has_video(parsed.get(pictures)):
            text = f"videos are supported on {CHAT_PATH}, not on {path}"
            return VLLMValidationError(text, parameter=pictures)
    except (ValueError, RecursionError):
        pass
    return None
