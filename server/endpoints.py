"""The endpoint plug-in: our fields on chat and token-count requests, a ``score`` object in responses, metrics.

Annotations stay real objects in this file: FastAPI reads them through vLLM's decorators.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm import envs
from vllm.entrypoints.openai.chat_completion import api_router as upstream_chat
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.tokenize import api_router as upstream_tokenize
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from score_vllm import plugin
from score_vllm.config import MEDIA_CONNECTOR, ServingConfig
from score_vllm.models.cell_records import EncodedCellsReader
from score_vllm.models.media_error import MediaError
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.timing import STATS_VARIABLE
from score_vllm.models.video_loaders import DECORD_LOADER, PYAV_LOADER, model_resize
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.server import again, explain, metrics, playground, request_log, sampling
from score_vllm.server.body_limit import MIB, BodyLimit
from score_vllm.server.content import OWN_FIELDS
from score_vllm.server.context import RequestContext, ServerState, counts, enter
from score_vllm.server.options import DEFAULT_BODY_MIB
from score_vllm.server.other_routes import CHAT_PATH, TOKENIZE_PATH, RefuseElsewhere
from score_vllm.server.protocol import (
    ScoreChatCompletionRequest,
    ScoreChatCompletionResponse,
    ScoreTokenizeChatRequest,
    ScoreTokenizeResponse,
)
from score_vllm.server.render import hook_renderer
from score_vllm.video import sandbox
from score_vllm.video.sampling import DEFAULT_MAX_FRAMES

# Encoded videos in work and decoded frames not yet read by the model's processor, over all requests of this process.
DECODING_BYTES = 2 << 30

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "A field, a file or a video is at fault; the message says which and what is accepted.",
        404: "No such model.",
        413: "The body is larger than --max-body-mib.",
        422: "The media server refused the URL.",
        500: "The server is at fault.",
        502: "The media server failed or cannot be reached.",
        503: "Too much is waiting, or this server cannot read media at the moment; see Retry-After.",
        504: "The media server did not deliver in time.",
    }.items()
}


class StartupError(RuntimeError):
    """The server must not start: it would serve uncompressed, or wrong."""


async def create_chat_completion(request: ScoreChatCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's chat completion. Videos reach the language model with `retention_ratio` of their visual tokens;
    the response's `score` object says how many that were, and what was read of each video."""
    state: ServerState | None = raw_request.app.state.score
    contexts: list[RequestContext] = []

    async def attempt() -> Response:
        if contexts:
            counts.set(False)  # its videos are counted already
            if (record := request_log.current.get()) is not None:
                record.reports.clear()
        contexts.append(enter(request, state))
        contexts[-1].encoded = None if state is None else state.encoded
        return await upstream_chat.create_chat_completion(request, raw_request)

    async def attempt_stream() -> AsyncIterable[Any]:
        try:
            response = await attempt()
        except MediaError as error:
            response = await media_error_response(raw_request, error)
        return response.body_iterator if isinstance(response, StreamingResponse) else _as_events(response)

    response = await again.answered(attempt)
    if state is not None and isinstance(response, StreamingResponse):
        events = again.streamed(response.body_iterator, attempt_stream)
        response.body_iterator = _stream_with_score(events, state, contexts)
        return response
    return await _json_with_score(response, state, contexts[-1])


async def tokenize(request: TokenizeCompletionRequest | ScoreTokenizeChatRequest, raw_request: Request) -> Response:
    """Count the tokens of a prompt or chat, with `score` as the chat completion would answer it."""
    state: ServerState | None = raw_request.app.state.score
    if isinstance(request, TokenizeCompletionRequest):
        for name in OWN_FIELDS:
            if name in (request.model_extra or {}):
                raise VLLMValidationError(f"{name} was given, but the request has no messages", parameter=name)
        return await upstream_tokenize.tokenize(request, raw_request)
    context = enter(request, state)
    return await _json_with_score(await upstream_tokenize.tokenize(request, raw_request), state, context)


async def _as_events(refusal: Response) -> AsyncIterator[str]:
    """A refusal where a stream has begun already."""
    yield f"data: {bytes(refusal.body).decode()}\n\n"
    yield "data: [DONE]\n\n"


async def _json_with_score(response: Response, state: ServerState | None, context: RequestContext) -> Response:
    if state is None or not isinstance(response, JSONResponse) or response.status_code != 200:
        return response
    body = json.loads(bytes(response.body))
    body["score"] = await explain.explained(context.score(state.serving), state, context)
    kept = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
    return JSONResponse(body, headers=kept, background=response.background)


async def media_error_response(request: Request, error: MediaError) -> JSONResponse:
    """The handler of :class:`MediaError`: its status, its field, and when to ask again."""
    body = ErrorInfo(
        message=error.message, type=error.http_status.phrase, param=error.parameter, code=error.http_status.value
    )
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(ErrorResponse(error=body).model_dump(), status_code=error.http_status, headers=headers)


async def http_error_response(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework refuses (a body that is no text, an unknown path) in the form of all other errors: vLLM's own
    handler is for FastAPI's exceptions, and these are Starlette's."""
    status = HTTPStatus(error.status_code)
    body = ErrorResponse(error=ErrorInfo(message=str(error.detail), type=status.phrase, code=status.value))
    return JSONResponse(body.model_dump(), status_code=status, headers=error.headers)


async def _stream_with_score(
    events: AsyncIterable[Any], state: ServerState, contexts: list[RequestContext]
) -> AsyncIterator[Any]:
    """Pass server-sent events on; the first chunk and the last before ``[DONE]`` carry the report.

    The first: OpenAI's own ``.stream()`` makes its final completion of that chunk's extra fields, and of no other's.
    Only what may be the last waits for its successor: one that ends a choice, or the usage chunk. No token is late.
    """
    held: Any = None
    begun = False
    async for event in events:
        text = event if isinstance(event, str) else bytes(event).decode()
        if text.startswith("data: [DONE]") and held is not None:
            score = contexts[-1].score(state.serving)
            yield _with_score(held, await explain.explained(score, state, contexts[-1]))
            held = None
        elif held is not None and text.startswith("data: "):
            yield held
            held = None
        if not begun and text.startswith("data: {"):
            event, begun = _with_score(event, contexts[-1].score(state.serving)), True
        # Inside a token's text the quotes of this mark would be escaped.
        if text.startswith("data: {") and '"finish_reason":null' not in text:
            held = event
        else:
            yield event
    if held is not None:
        yield held


def _with_score(event: Any, score: dict[str, Any]) -> Any:
    text = event if isinstance(event, str) else bytes(event).decode()
    chunk = json.loads(text.removeprefix("data: "))
    if "choices" not in chunk:
        return event  # an error event
    chunk["score"] = score
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def _verify(engine_client: Any, serving: ServingConfig) -> None:
    """Compression is in place in this process and in every worker, with one and the same policy."""
    if not plugin.is_registered():
        raise StartupError("the score plug-in did not load in the API process; see the log above for its error")
    if not isinstance(engine_client.renderer.get_mm_processor(), CompressionProcessorMixin):
        raise StartupError("the model's processor is vLLM's own, not SCORE's: videos would not be compressed")
    if engine_client.vllm_config.parallel_config.worker_extension_cls != WORKER_EXTENSION:
        raise StartupError(f"workers cannot be checked; start with --worker-extension-cls {WORKER_EXTENSION}")
    try:
        await engine_client.collective_rpc("score_check", args=(serving.policy_digest,))
    except Exception as error:  # vLLM wraps what a worker raised
        raise StartupError(str(error)) from error


def _prepare_reading(engine_client: Any) -> int | None:
    """Let videos be decoded at the size that the model's processor would scale them to.

    Returns:
        Most frames that a request may ask for; None where another loader than ours reads.
    """
    video = engine_client.vllm_config.model_config.multimodal_config.media_io_kwargs.get("video", {})
    if envs.VLLM_MEDIA_CONNECTOR != MEDIA_CONNECTOR or video.get("video_backend") not in (PYAV_LOADER, DECORD_LOADER):
        return None
    if (resize := model_resize(engine_client.renderer.get_mm_processor().info)) is not None:
        video.setdefault("resize", resize.to_json())
    return int(video.get("num_frames", DEFAULT_MAX_FRAMES))


async def _announce(host: str | None, port: int, text: str) -> None:
    """Print how to call the server once its port answers."""
    while True:
        try:
            _, writer = await asyncio.open_connection(host or "127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.2)
            continue
        writer.close()
        sys.stdout.write(text)
        sys.stdout.flush()
        return


class ScoreEndpointPlugin:
    """Entry point of ``vllm.endpoint_plugins``; see vLLM's interface of that name."""

    name = "score"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Put our chat route in the place of vLLM's; refuse our field on the others."""
        app.state.score = None
        app.add_api_route(
            CHAT_PATH,
            create_chat_completion,
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            response_model=None,
            responses={200: {"model": ScoreChatCompletionResponse, "content": {"text/event-stream": {}}}, **_ERRORS},
            summary="Chat completion; videos are compressed to retention_ratio of their tokens",
        )
        app.add_api_route(
            TOKENIZE_PATH,
            tokenize,
            methods=["POST"],
            dependencies=[Depends(validate_json_request)],
            response_model=None,
            responses={200: {"model": ScoreTokenizeResponse}, **_ERRORS},
            summary="Count tokens; those of videos as a chat completion would",
        )
        app.add_exception_handler(MediaError, media_error_response)  # type: ignore[arg-type]
        app.add_exception_handler(HTTPException, http_error_response)  # type: ignore[arg-type]
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        ours = {CHAT_PATH, TOKENIZE_PATH}
        paths = frozenset(route.path for route in routes if "POST" in route.methods) - ours
        app.add_middleware(RefuseElsewhere, paths=paths)
        app.add_middleware(BodyLimit)
        app.add_middleware(request_log.RequestLog, always=frozenset({CHAT_PATH}))
        metrics.attach_page(app)
        playground.attach(app)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Check that every process compresses, then hook the renderer and the metrics.

        Raises:
            StartupError: compression is configured and not in place somewhere.
        """
        state.score_body_limit = getattr(args, "max_body_mib", DEFAULT_BODY_MIB) * MIB
        config = None if engine_client is None else engine_client.vllm_config.model_config.hf_config
        serving = None if config is None else ServingConfig.from_hf_config(config)
        if serving is None:
            return
        await _verify(engine_client, serving)
        sampling.guard_inputs(engine_client)
        request_log.watch_engine(engine_client)
        request_log.configure(getattr(args, "log_format", "text"))
        sandbox.configure(max_bytes_in_flight=DECODING_BYTES)
        sandbox.start()
        hook_renderer(engine_client.renderer)
        encoded = None
        if (directory := os.environ.get(STATS_VARIABLE)) is not None:
            metrics.expose_workers(Path(directory))
            encoded = EncodedCellsReader(Path(directory))
        trusts = bool(args.trust_request_mm_kwargs)
        shown = bool(getattr(args, "playground", False))
        state.score = ServerState(serving, _prepare_reading(engine_client), trusts, encoded, engine_client, shown)
        if (text := getattr(args, "score_banner", None)) is not None:
            state.score_announcement = asyncio.create_task(_announce(args.host, args.port, text))
