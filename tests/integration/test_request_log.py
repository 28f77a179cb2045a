"""The log's line per request, without an engine: which requests get one, and what it says of odd endings."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from score_vllm.models.processing import VideoReport, VideoSpec
from score_vllm.models.video_options import VideoOptions, decode_seconds
from score_vllm.server import request_log
from score_vllm.types import VideoGrid

CHAT = "/v1/chat/completions"
STATS = SimpleNamespace(queued_ts=10.0, scheduled_ts=10.25, first_token_ts=11.0)


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> Any:
    logger = request_log.logger
    before = logger.handlers[:], logger.level, logger.propagate
    caplog.set_level(logging.INFO, logger.name)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def report(ratio: float) -> VideoReport:
    return VideoReport(VideoGrid(2, 5, 5), 5, VideoSpec(ratio, "evs", VideoOptions()), 7, structure_tokens=3, ticket=9)


def run(app: Any, path: str = CHAT, method: str = "POST", incoming: list[str] | None = None) -> list[dict[str, Any]]:
    """What was sent to a client whose messages come in this order."""
    waiting, sent = iter(incoming or ["http.request", "http.disconnect"]), []

    async def receive() -> dict[str, Any]:
        return {"type": next(waiting), "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    log = request_log.RequestLog(app, frozenset({CHAT}))
    asyncio.run(log({"type": "http", "method": method, "path": path}, receive, send))
    return sent


async def answer(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await send({"type": "http.response.body", "body": b"b"})


def test_a_served_request(caplog: pytest.LogCaptureFixture) -> None:
    async def outputs() -> AsyncIterator[Any]:
        yield SimpleNamespace(metrics=STATS)
        yield SimpleNamespace(metrics=STATS)

    client = SimpleNamespace(generate=lambda *args, **kwargs: outputs())
    request_log.watch_engine(client)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        decode_seconds.get().extend([0.5, 0.25])  # type: ignore[union-attr]
        request_log.current.get().reports.extend([report(0.1), report(0.1)])  # type: ignore[union-attr]
        assert len([output async for output in client.generate("prompt", None, "chatcmpl-1")]) == 2
        await answer(send)

    assert len(run(app)) == 3
    (line,) = caplog.records
    assert (line.levelname, line.name) == ("INFO", "score_vllm.requests")
    expected = {
        "request_id": "chatcmpl-1", "path": CHAT, "status": 200, "videos": 2, "method": "evs", "ratio": 0.1,
        "original_tokens": 100, "retained_tokens": 10, "structure_tokens": 6, "decode_ms": 750.0,
        "tower_ms": None, "compressor_ms": None, "queue_ms": 250.0, "prefill_ms": 750.0,
    }  # fmt: skip
    assert {name: getattr(line, name) for name in expected} == expected
    assert "request_id=chatcmpl-1 path=/v1/chat/completions status=200 videos=2" in line.getMessage()
    assert "tower_ms=- compressor_ms=- queue_ms=250.0" in line.getMessage()
    parsed = json.loads(request_log._JsonFormatter().format(line))
    assert {name: parsed[name] for name in expected} == expected
    assert (parsed["levelname"], parsed["message"], parsed["total_ms"]) == ("INFO", "request", line.total_ms)


def test_ratios_that_differ_are_a_list(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request_log.current.get().reports.extend([report(0.1), report(0.5)])  # type: ignore[union-attr]
        await answer(send)

    run(app, "/v1/completions")
    (line,) = caplog.records
    assert line.ratio == [0.1, 0.5]
    assert "ratio=0.1,0.5 " in line.getMessage()


def test_which_requests_get_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 400)

    run(app, "/tokenize")
    run(app, CHAT, "GET")
    assert caplog.records == []
    run(app)
    assert [line.status for line in caplog.records] == [400]
    assert caplog.records[0].request_id is None


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_client_that_goes_away(cancelled: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if cancelled:
            raise asyncio.CancelledError
        assert (await receive())["type"] == "http.disconnect"
        await answer(send)

    if cancelled:
        with pytest.raises(asyncio.CancelledError):
            run(app)
    else:
        run(app)
    assert [line.status for line in caplog.records] == [499]


def test_an_answer_that_was_complete_is_no_vanished_client(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await answer(send)
        assert (await receive())["type"] == "http.disconnect"

    run(app)
    assert [line.status for line in caplog.records] == [200]


def test_the_engines_stream_is_closed_with_the_clients() -> None:
    closed = []

    async def outputs() -> AsyncIterator[Any]:
        try:
            yield SimpleNamespace(metrics=None)
            yield SimpleNamespace(metrics=None)
        finally:
            closed.append(True)

    client = SimpleNamespace(generate=lambda *args, **kwargs: outputs())
    request_log.watch_engine(client)

    async def leave_early() -> None:
        request_log.current.set(request_log.RequestRecord())
        stream = client.generate("prompt", None, "1")
        await anext(stream)
        await stream.aclose()
        assert closed == [True]
        assert request_log.current.get().fields(CHAT, 200)["prefill_ms"] is None  # type: ignore[union-attr]

    asyncio.run(leave_early())


@pytest.mark.parametrize(("log_format", "handlers"), [("text", 1), ("json", 1), ("none", 0)])
def test_formats(log_format: str, handlers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = request_log.logger
    monkeypatch.setattr(logger, "hasHandlers", lambda: False)
    request_log.configure(log_format)
    assert len(logger.handlers) == handlers
    assert logger.isEnabledFor(logging.INFO) == bool(handlers)


def test_an_operators_own_handler_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_log.logger.hasHandlers(), "pytest's, on the root"
    request_log.configure("text")
    assert request_log.logger.handlers == []
