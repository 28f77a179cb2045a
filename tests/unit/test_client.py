"""The shared HTTP client against a stub endpoint: what is sent, retried, read and refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from score_vllm.client import (
    Client,
    NotCompressed,
    Reply,
    RequestFailed,
    chat_body,
    compressed_lengths,
    user_message,
    video_url,
)
from tests.stub_server import Answer, Stub, completion, compressing, stub_server


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


def ask(stub: Stub, body: dict[str, Any], key: str | None = None, **options: Any) -> Reply:
    async def call() -> Reply:
        async with Client(stub.url, key, first_wait=0.001, **options) as client:
            return await client.chat(body)

    return asyncio.run(call())


def test_a_busy_server_is_asked_again(stub: Stub) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        return (503, b"busy") if len(stub.bodies) < 3 else compressing(body)

    stub.reply = reply
    body = chat_body("m", [user_message("file:///v.mp4", "What?")], max_tokens=3, retention_ratio=0.25)
    assert ask(stub, body, "secret", retries=2) == Reply("A", "stop", 270, 1, None)
    assert stub.bodies == [body] * 3
    assert stub.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("answer", "message", "tries", "status", "exhausted"),
    [
        ((400, {"error": {"message": "no"}}), "^HTTP 400: no$", 1, 400, False),
        ((401, {"detail": "key"}), "^HTTP 401: key$", 1, 401, False),
        ((500, b"boom"), r"^HTTP 500: boom \(after 2 tries\)$", 2, 500, True),
        ((200, b"<html>"), "not a chat completion: '<html>'", 1, None, False),
        ((200, {"object": "error"}), "not a chat completion", 1, None, False),
        ((200, {"choices": [{"message": {"content": 7}}]}), "not a chat completion", 1, None, False),
    ],
)
def test_a_failed_request_says_why(
    answer: Answer, message: str, tries: int, status: int | None, exhausted: bool, stub: Stub
) -> None:
    stub.reply = lambda _: answer
    with pytest.raises(RequestFailed, match=message) as caught:
        ask(stub, {}, retries=1)
    assert len(stub.bodies) == tries
    assert (caught.value.status, caught.value.exhausted) == (status, exhausted)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, None), ("", ""), ([{"type": "text", "text": "a"}, {"type": "x"}, {"type": "text", "text": "b"}], "ab")],
)
def test_content_as_servers_write_it(content: Any, text: str | None, stub: Stub) -> None:
    stub.reply = lambda _: (200, {"choices": [{"message": {"content": content}}], "score": {"method": "evs"}})
    assert ask(stub, {}) == Reply(text, None, None, None, {"method": "evs"})


def test_a_slow_server_and_one_that_is_not_there(stub: Stub) -> None:
    def late(body: dict[str, Any]) -> Answer:
        time.sleep(0.3)
        return compressing(body)

    stub.reply = late
    with pytest.raises(RequestFailed, match=rf"{stub.url}: no answer within 0\.05 s"):
        ask(stub, {}, timeout=0.05)
    stub.url = "http://127.0.0.1:9/v1"
    with pytest.raises(RequestFailed, match=f"{stub.url}: ConnectError") as caught:
        ask(stub, {})
    assert caught.value.exhausted


def test_models(stub: Stub) -> None:
    async def call() -> list[str]:
        async with Client(stub.url) as client:
            return await client.models()

    assert asyncio.run(call()) == ["stub"]


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:80", {}, "base_url must begin with http:// or https://, got '127.0.0.1:80'"),
        ("http://x:port", {}, "is no URL"),
        ("http://x", {"retries": -1}, "retries must be >= 0, got -1"),
        ("http://x", {"timeout": 0}, "timeout must be > 0 seconds, got 0"),
        ("http://x", {"first_wait": 0}, "first_wait must be > 0 seconds, got 0"),
    ],
)
def test_wrong_arguments_are_named(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(url, **options)


def test_video_urls(tmp_path: Path) -> None:
    clip = tmp_path / "a clip.mkv"
    clip.write_bytes(b"pixels")
    assert video_url(clip, "file") == clip.as_uri()
    assert video_url(clip, "base64") == "data:video/x-matroska;base64,cGl4ZWxz"
    with pytest.raises(ValueError, match="send must be 'file' or 'base64', got 'frames'"):
        video_url(clip, "frames")


def lengths(stub: Stub, ratios: list[float], **fields: Any) -> dict[float, int]:
    async def call() -> dict[float, int]:
        async with Client(stub.url) as client:
            return await compressed_lengths(client, {"model": "m", "messages": [], **fields}, ratios)

    return asyncio.run(call())


def test_prompts_that_follow_the_ratio(stub: Stub) -> None:
    assert lengths(stub, [0.25, 0.1]) == {0.25: 270, 0.1: 120, 1.0: 1020}
    assert {body["max_tokens"] for body in stub.bodies} == {1}

    def too_long(body: dict[str, Any]) -> Answer:
        return (400, {"error": {"message": "too long"}}) if body["retention_ratio"] == 1 else compressing(body)

    stub.reply = too_long
    assert lengths(stub, [0.25]) == {0.25: 270, 0.125: 145}


@pytest.mark.parametrize(("status", "compared"), [(200, (0.25, 1)), (400, (0.125, 0.25))])
def test_a_server_that_ignores_the_ratio_is_found_out(status: int, compared: tuple[float, float], stub: Stub) -> None:
    """Also where ratio 1 is refused."""

    def same(body: dict[str, Any]) -> Answer:
        refused = status == 400 and body["retention_ratio"] == 1
        return (400, {"error": "too long"}) if refused else completion(prompt_tokens=1000)

    stub.reply = same
    seen = " prompt tokens at ratio ".join(["1000", f"{compared[0]}, 1000", str(compared[1])])
    with pytest.raises(NotCompressed, match=f"the server ignores retention_ratio: {seen}; start score-serve"):
        lengths(stub, [0.25])


def test_compression_that_cannot_be_verified(stub: Stub) -> None:
    stub.reply = lambda _: completion(prompt_tokens=None)
    with pytest.raises(NotCompressed, match=r"no usage\.prompt_tokens"):
        lengths(stub, [0.25])
    stub.reply = lambda body: (200, {**compressing(body)[1], "score": {"method": "vidcom2"}})
    assert lengths(stub, [0.25])[0.25] == 270
    with pytest.raises(NotCompressed, match="retention_method 'evs' was asked for, and the server used 'vidcom2'"):
        lengths(stub, [0.25], retention_method="evs")
