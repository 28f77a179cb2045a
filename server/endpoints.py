"""The endpoint plug-in: ``retention_ratio`` on chat requests, a ``score`` object in responses, metrics.

Annotations stay real objects in this file: FastAPI reads them through vLLM's decorators.
"""

import asyncio
import binascii
import json
import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion import api_router as upstream
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from score_vllm import plugin
from score_vllm.config import ServingConfig
from score_vllm.models.adapter import RATIO_KEY, REPORT_KEY, CompressionProcessorMixin, VideoReport
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.server import metrics
from score_vllm.server.protocol import FIELD, ScoreChatCompletionRequest
from score_vllm.video import VideoError

CHAT_PATH = "/v1/chat/completions"


class StartupError(RuntimeError):
    """The server must not start: it would serve uncompressed, or wrong."""


@dataclass
class _RequestContext:
    """Travels with one chat request from the route down to the renderer and back."""

    ratio: float | list[float] | None
    reports: list[VideoReport] = field(default_factory=list)


_current: ContextVar[_RequestContext | None] = ContextVar("score_request", default=None)


def _score_object(serving: ServingConfig, context: _RequestContext) -> dict[str, Any]:
    return {
        "method": serving.method,
        "retention_ratio": serving.retention_ratio if context.ratio is None else context.ratio,
        "videos": [report.to_json() for report in context.reports],
    }


async def create_chat_completion(request: ScoreChatCompletionRequest, raw_request: Request) -> Response:
    """vLLM's own chat handler, with our field taken in and our report put out."""
    serving: ServingConfig | None = raw_request.app.state.score
    if serving is None:
        if request.retention_ratio is not None:
            raise VLLMValidationError(f"{FIELD} was given, but this server runs without SCORE", parameter=FIELD)
        return await upstream.create_chat_completion(request, raw_request)
    context = _RequestContext(request.retention_ratio)
    _current.set(context)  # each request has a context of its own
    response = await upstream.create_chat_completion(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _stream_with_score(response.body_iterator, serving, context)
    elif isinstance(response, JSONResponse) and response.status_code == 200:
        body = json.loads(bytes(response.body))
        body["score"] = _score_object(serving, context)
        kept = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
        response = JSONResponse(body, headers=kept)
    return response


async def _stream_with_score(
    events: AsyncIterable[Any], serving: ServingConfig, context: _RequestContext
) -> AsyncIterator[Any]:
    """Pass server-sent events on, one behind, so that the last chunk before ``[DONE]`` can carry the report."""
    held: Any = None
    async for event in events:
        text = event if isinstance(event, str) else bytes(event).decode()
        if text.startswith("data: [DONE]"):
            if held is not None:
                held = _with_score(held, _score_object(serving, context))
        elif not text.startswith("data: "):
            yield event  # a keep-alive comment: it must not wait
            continue
        if held is not None:
            yield held
        held = event
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
    """Routes other than chat completions refuse the field: ignored in silence it would cost the client money."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith(CHAT_PATH):
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        body = b""
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        if _names_field(body):
            text = f"{FIELD} is supported on {CHAT_PATH} only, not on {scope['path']}"
            error = create_error_response(VLLMValidationError(text, parameter=FIELD))
            await JSONResponse(error.model_dump(), status_code=error.error.code)(scope, receive, send)
            return
        replay = iter(messages)

        async def replayed() -> Message:
            return next(replay, None) or await receive()

        await self.app(scope, replayed, send)


def _names_field(body: bytes) -> bool:
    # A cheap look first: bodies can hold whole videos. An escaped key needs a backslash-u.
    if FIELD.encode() not in body and b"\\u" not in body:
        return False
    try:
        parsed = json.loads(body)
    except ValueError:
        return False
    return isinstance(parsed, dict) and FIELD in parsed


def _hook_renderer(renderer: Any) -> None:
    """Carry the ratio into the processor after vLLM's check of client options, and the reports back."""

    def inject(extras: dict[str, Any] | None) -> dict[str, Any] | None:
        context = _current.get()
        if context is None or context.ratio is None:
            return extras
        extras = dict(extras or {})
        extras["mm_processor_kwargs"] = {**(extras.get("mm_processor_kwargs") or {}), RATIO_KEY: context.ratio}
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


async def _announce(port: int, text: str) -> None:
    """Print how to call the server once its port answers."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
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
        app.add_middleware(RefuseRetentionRatioElsewhere)

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
        _hook_renderer(engine_client.renderer)
        if serving.stats_dir is not None:
            metrics.expose_compressor_seconds(Path(serving.stats_dir))
        state.score = serving
        if (text := getattr(args, "score_banner", None)) is not None:
            state.score_announcement = asyncio.create_task(_announce(args.port, text))
