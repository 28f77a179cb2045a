"""The endpoint plug-in: ``retention_ratio`` on chat requests, a ``score`` object in responses, metrics.

Annotations stay real objects in this file: FastAPI reads them through vLLM's decorators.
"""

import asyncio
import binascii
import json
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as upstream
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from score_vllm import plugin
from score_vllm.config import ServingConfig
from score_vllm.models.processing import METHOD_KEY, RATIO_KEY, REPORT_KEY, CompressionProcessorMixin, VideoReport
from score_vllm.models.timing import STATS_VARIABLE
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.server import metrics
from score_vllm.server.protocol import FIELD, METHOD_FIELD, ScoreChatCompletionRequest
from score_vllm.video import VideoError, sandbox

CHAT_PATH = "/v1/chat/completions"
UNCOUNTED_PATHS = frozenset({"/tokenize", "/v1/messages/count_tokens"})


class StartupError(RuntimeError):
    """The server must not start: it would serve uncompressed, or wrong."""


@dataclass
class _RequestContext:
    """Travels with one chat request from the route down to the renderer and back."""

    ratio: float | list[float] | None
    method: str | None = None
    reports: list[VideoReport] = field(default_factory=list)


_current: ContextVar[_RequestContext | None] = ContextVar("score_request", default=None)
# False while a request is served that only renders a prompt: its videos reach no language model.
_counts: ContextVar[bool] = ContextVar("score_counts", default=True)


def _score_object(serving: ServingConfig, context: _RequestContext) -> dict[str, Any]:
    return {
        "method": context.method or serving.method,
        "retention_ratio": serving.retention_ratio if context.ratio is None else context.ratio,
        "videos": [report.to_json() for report in context.reports],
    }


async def create_chat_completion(request: ScoreChatCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's chat completion. Videos reach the language model with `retention_ratio` of their visual tokens;
    the response's `score` object says how many that were."""
    serving: ServingConfig | None = raw_request.app.state.score
    if serving is None:
        for name in (FIELD, METHOD_FIELD):
            if getattr(request, name) is not None:
                raise VLLMValidationError(f"{name} was given, but this server runs without SCORE", parameter=name)
        return await upstream.create_chat_completion(request, raw_request)
    if request.retention_method not in (None, *serving.methods):
        raise VLLMValidationError(
            f"{METHOD_FIELD} must be one of {list(serving.methods)} on this server, got {request.retention_method!r}",
            parameter=METHOD_FIELD,
        )
    context = _RequestContext(request.retention_ratio, request.retention_method)
    _current.set(context)  # each request has a context of its own
    response = await upstream.create_chat_completion(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _stream_with_score(response.body_iterator, serving, context)
    elif isinstance(response, JSONResponse) and response.status_code == 200:
        body = json.loads(bytes(response.body))
        body["score"] = _score_object(serving, context)
        kept = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
        response = JSONResponse(body, headers=kept, background=response.background)
    return response


async def _stream_with_score(
    events: AsyncIterable[Any], serving: ServingConfig, context: _RequestContext
) -> AsyncIterator[Any]:
    """Pass server-sent events on; the last chunk before ``[DONE]`` carries the report.

    Only what may be that chunk waits for its successor: one that ends a choice, or the usage chunk. No token is late.
    """
    held: Any = None
    async for event in events:
        text = event if isinstance(event, str) else bytes(event).decode()
        if text.startswith("data: [DONE]") and held is not None:
            yield _with_score(held, _score_object(serving, context))
            held = None
        elif held is not None and text.startswith("data: "):
            yield held
            held = None
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


class RefuseRetentionRatioElsewhere:
    """Routes other than chat completions refuse the field: ignored in silence it would cost the client money.

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
        if scope["type"] != "http" or scope["method"] != "POST" or path not in self.paths:
            await self.app(scope, receive, send)
            return
        _counts.set(path not in UNCOUNTED_PATHS)
        messages: list[Message] = []
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        named = _named_field(b"".join(message.get("body", b"") for message in messages))
        if named is not None:
            text = f"{named} is supported on {CHAT_PATH} only, not on {path}"
            error = create_error_response(VLLMValidationError(text, parameter=named))
            await JSONResponse(error.model_dump(), status_code=error.error.code)(scope, receive, send)
            return
        replay = iter(messages)

        async def replayed() -> Message:
            return next(replay, None) or await receive()

        await self.app(scope, replayed, send)


def _named_field(body: bytes) -> str | None:
    # A cheap look first: bodies can hold whole videos. An escaped key needs a backslash-u, UTF-16 and UTF-32 a NUL.
    fields = (FIELD, METHOD_FIELD)
    if not any(sign in body for sign in (*(name.encode() for name in fields), b"\\u", b"\0")):
        return None
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return next((name for name in fields if name in parsed), None) if isinstance(parsed, dict) else None


def _hook_renderer(renderer: Any) -> None:
    """Carry the ratio into the processor after vLLM's check of client options, and the reports back."""

    def inject(extras: dict[str, Any] | None) -> dict[str, Any] | None:
        context = _current.get()
        if context is None:
            return extras
        asked = {RATIO_KEY: context.ratio, METHOD_KEY: context.method}
        asked = {key: value for key, value in asked.items() if value is not None}
        if not asked:
            return extras
        extras = dict(extras or {})
        extras["mm_processor_kwargs"] = {**(extras.get("mm_processor_kwargs") or {}), **asked}
        return extras

    def collect(engine_inputs: Iterable[Any]) -> None:
        reports = [report for engine_input in engine_inputs for report in engine_input.get(REPORT_KEY, ())]
        context = _current.get()
        if context is not None:
            if isinstance(context.ratio, list) and len(context.ratio) != len(reports):
                raise VLLMValidationError(
                    f"{FIELD} has {len(context.ratio)} entries, but the request has {len(reports)} video(s); "
                    "give one number in (0, 1] per video, or one for all",
                    parameter=FIELD,
                )
            context.reports.extend(reports)
        if _counts.get():
            metrics.count_videos(reports)

    render_chat, render_cmpl = renderer.render_chat_async, renderer.render_cmpl_async

    async def render_chat_async(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        try:
            conversations, prompts = await render_chat(*args, prompt_extras=inject(prompt_extras), **kwargs)
        except VideoError as error:
            raise VLLMValidationError(f"video_url: {error}", parameter="video_url") from error
        except binascii.Error as error:
            text = f"the data URL of an image or video is not valid base64: {error}"
            raise VLLMValidationError(text, parameter="messages") from error
        except (OSError, aiohttp.ClientError) as error:
            # An unreachable host or a missing file would be a 500 upstream; the server is not at fault.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            text = f"an image or video of the request cannot be loaded: {reason}"
            raise VLLMValidationError(text, parameter="messages") from error
        except NotImplementedError as error:
            # Upstream answers 501 to a data URL that is not base64; the mistake is the client's.
            raise VLLMValidationError(str(error), parameter="messages") from error
        collect(prompts)
        return conversations, prompts

    async def render_cmpl_async(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        prompts = await render_cmpl(*args, prompt_extras=inject(prompt_extras), **kwargs)
        collect(prompts)
        return prompts

    renderer.render_chat_async, renderer.render_cmpl_async = render_chat_async, render_cmpl_async


async def _verify(engine_client: Any, serving: ServingConfig) -> None:
    """Compression is in place in this process and in every worker, with one and the same policy."""
    if not plugin.is_registered():
        raise StartupError("the score plug-in did not load in the API process; see the log above for its error")
    if not isinstance(engine_client.renderer.get_mm_processor(), CompressionProcessorMixin):
        raise StartupError("the model's processor is vLLM's own, not SCORE's: videos would not be compressed")
    if engine_client.vllm_config.parallel_config.worker_extension_cls != WORKER_EXTENSION:
        raise StartupError(f"workers cannot be checked; start with --worker-extension-cls {WORKER_EXTENSION}")
    for rank, status in enumerate(await engine_client.collective_rpc("score_status")):
        if not status["compressing"]:
            raise StartupError(
                f"worker {rank} runs {status['model_class']} without SCORE: the plug-in did not load there"
            )
        if serving.policy_digest and status["policy_digest"] != serving.policy_digest:
            raise StartupError(f"worker {rank} holds another policy than the API process; start the server again")


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
            responses={200: {"content": {"text/event-stream": {}}}},
            summary="Chat completion; videos are compressed to retention_ratio of their tokens",
        )
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        paths = frozenset(route.path for route in routes if "POST" in route.methods) - {CHAT_PATH}
        app.add_middleware(RefuseRetentionRatioElsewhere, paths=paths)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Check that every process compresses, then hook the renderer and the metrics.

        Raises:
            StartupError: compression is configured and not in place somewhere.
        """
        config = None if engine_client is None else engine_client.vllm_config.model_config.hf_config
        serving = None if config is None else ServingConfig.from_hf_config(config)
        if serving is None:
            return
        await _verify(engine_client, serving)
        sandbox.start()
        _hook_renderer(engine_client.renderer)
        if (directory := os.environ.get(STATS_VARIABLE)) is not None:
            metrics.expose_compressor_seconds(Path(directory))
        state.score = serving
        if (text := getattr(args, "score_banner", None)) is not None:
            state.score_announcement = asyncio.create_task(_announce(args.host, args.port, text))
