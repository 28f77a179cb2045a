"""One line in the log per request: what its videos became, and where its time went.

Logger ``score_vllm.requests``, level INFO. The line's fields are attributes of the record too, so that a handler of the
operator's own can use them.
"""

import asyncio
import json
import logging
import math
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from score_vllm.models.processing import VideoReport
from score_vllm.models.timing import STATS_VARIABLE, read_videos
from score_vllm.models.video_options import decode_seconds
from score_vllm.server.arguments import LOG_FORMATS

logger = logging.getLogger("score_vllm.requests")

# As nginx has it: the client went away before the answer was complete.
CLIENT_GONE = 499


@dataclass
class RequestRecord:
    """Of one request, filled by whoever knows.

    Attributes:
        started: ``time.monotonic()``.
        request_id: of the engine; None where the request did not get there.
        reports: one per video.
        decoded: seconds of each video that was decoded.
        stats: vLLM's ``RequestStateStats``, which the engine's loop keeps up to date.
    """

    started: float = field(default_factory=time.monotonic)
    request_id: str | None = None
    reports: list[VideoReport] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    stats: Any = None

    def fields(self, path: str, status: int) -> dict[str, Any]:
        """What is logged; null where there is nothing to say."""
        encoded = {}
        if self.reports and (directory := os.environ.get(STATS_VARIABLE)) is not None:
            tickets = [report.ticket for report in self.reports if report.ticket is not None]
            encoded = read_videos(Path(directory), tickets, self.started)
        stamps = [getattr(self.stats, name, 0.0) for name in ("queued_ts", "scheduled_ts", "first_token_ts")]
        queued, scheduled, first = stamps
        return {
            "request_id": self.request_id,
            "path": path,
            "status": status,
            "videos": len(self.reports),
            "method": _common([report.spec.method for report in self.reports]),
            "ratio": _common([report.spec.retention_ratio for report in self.reports]),
            "original_tokens": sum(report.grid.num_tokens for report in self.reports),
            "retained_tokens": sum(report.retained_tokens for report in self.reports),
            "structure_tokens": sum(report.structure_tokens for report in self.reports),
            "decode_ms": _milliseconds(self.decoded),
            "tower_ms": _milliseconds([tower for tower, _ in encoded.values() if not math.isnan(tower)]),
            "compressor_ms": _milliseconds([selection for _, selection in encoded.values()]),
            "queue_ms": _milliseconds([scheduled - queued] if queued and scheduled else []),
            "prefill_ms": _milliseconds([first - scheduled] if scheduled and first else []),
            "total_ms": _milliseconds([time.monotonic() - self.started]),
        }


def _common(values: list[Any]) -> Any:
    """The value of all videos, or one per video."""
    return (values[0] if len(set(values)) == 1 else values) if values else None


def _milliseconds(seconds: list[float]) -> float | None:
    return round(1000 * sum(seconds), 2) if seconds else None


current: ContextVar[RequestRecord | None] = ContextVar("score_request_record", default=None)


class RequestLog:
    """Middleware: logs every POST that reached the engine or brought a video, and every one to a path of ``always``.

    Args:
        app: the next ASGI application.
        always: paths.
    """

    def __init__(self, app: ASGIApp, always: frozenset[str]) -> None:
        self.app = app
        self.always = always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http" or scope["method"] != "POST" or not logger.isEnabledFor(logging.INFO):
            await self.app(scope, receive, send)
            return
        record = RequestRecord()
        current.set(record)
        decode_seconds.set(record.decoded)
        status, complete = 500, False

        async def watch_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                status = CLIENT_GONE
            return message

        async def watch_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start" and status != CLIENT_GONE:
                status = message["status"]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, watch_receive, watch_send)
        except asyncio.CancelledError:
            status = status if complete else CLIENT_GONE
            raise
        finally:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if record.request_id or record.reports or path in self.always:
                values = record.fields(path, status)
                logger.info("request %s", " ".join(f"{k}={_plain(v)}" for k, v in values.items()), extra=values)


def _plain(value: Any) -> str:
    return "-" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def watch_engine(engine_client: Any) -> None:
    """Let the requests of the engine say what they are called there, and when their first token came."""
    generate = engine_client.generate

    async def watched(record: RequestRecord, outputs: Any) -> AsyncIterator[Any]:
        async with aclosing(outputs):
            async for output in outputs:
                if record.stats is None:
                    record.stats = output.metrics
                yield output

    def generate_watched(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(prompt, sampling_params, request_id, *args, **kwargs)
        if (record := current.get()) is None:
            return outputs
        record.request_id = record.request_id or request_id
        return watched(record, outputs)

    engine_client.generate = generate_watched


class _JsonFormatter(logging.Formatter):
    """The keys that ``--log-format json`` gives vLLM's lines, and the fields of ours."""

    def format(self, record: logging.LogRecord) -> str:
        known: dict[str, Any] = {"asctime": self.formatTime(record), "levelname": record.levelname, "name": record.name}
        known |= {"processName": record.processName, "process": record.process, "message": "request"}
        own = RequestRecord().fields("", 0)
        return json.dumps(known | {name: getattr(record, name, None) for name in own})


def configure(log_format: str) -> None:
    """Give the logger a handler, unless the operator's own logging configuration has done so.

    Args:
        log_format: one of :data:`LOG_FORMATS`.
    """
    assert log_format in LOG_FORMATS
    if log_format == "none":
        logger.setLevel(logging.WARNING)
        return
    if logger.hasHandlers() and logger.getEffectiveLevel() <= logging.INFO:
        return
    handler = logging.StreamHandler(sys.stdout)
    plain = logging.Formatter("%(levelname)s %(asctime)s score: %(message)s", "%m-%d %H:%M:%S")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else plain)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
