"""Requests that the engine gives back unanswered: sent again, unseen by the client, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import GenerationError

from score_vllm.server import again

ROLE = 'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TOKEN = 'data: {"choices":[{"delta":{"content":"A"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n'
ERROR = 'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}\n\n'
REFUSED = 'data: {"error": {"message": "the model does not exist", "code": 404}}\n\n'
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"


def test_vllm_still_says_it_so() -> None:
    """The message by which an engine's error is known."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    with pytest.raises(GenerationError) as raised:
        serving._raise_if_error("error", "request")
    assert str(raised.value) == again.ENGINE_ERROR
    event = f"data: {serving._convert_generation_error_to_streaming_response(raised.value)}\n\n"
    assert event.startswith('data: {"error"')
    assert again.ENGINE_ERROR in event


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_an_answer_comes_after_some_tries(failures: int) -> None:
    tries = []

    async def attempt() -> str:
        tries.append(1)
        if len(tries) <= failures:
            raise GenerationError(again.ENGINE_ERROR)
        return "answer"

    assert asyncio.run(again.answered(attempt)) == "answer"
    assert len(tries) == failures + 1


@pytest.mark.parametrize(("message", "expected"), [(again.ENGINE_ERROR, 3), ("another error", 1)])
def test_not_for_ever_and_not_for_other_errors(message: str, expected: int) -> None:
    tries = []

    async def attempt() -> str:
        tries.append(1)
        raise GenerationError(message)

    with pytest.raises(GenerationError, match=message):
        asyncio.run(again.answered(attempt))
    assert len(tries) == expected


def streamed(*streams: list[str]) -> tuple[list[str], int]:
    """What the client sees of these attempts, and how many there were."""
    rest = iter(streams)

    async def events() -> AsyncIterator[Any]:
        for event in next(rest):
            yield event

    async def attempt() -> AsyncIterator[Any]:
        return events()

    async def collect() -> list[str]:
        return [event async for event in again.streamed(events(), attempt)]

    return asyncio.run(collect()), len(streams) - len(list(rest))


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ([[ROLE, TOKEN, LAST, DONE]], [ROLE, TOKEN, LAST, DONE]),
        ([[ROLE, ERROR, DONE], [ROLE, TOKEN, LAST, DONE]], [ROLE, TOKEN, LAST, DONE]),
        ([[ROLE, ROLE, ERROR, DONE], [ROLE, ROLE, LAST, LAST, DONE]], [ROLE, ROLE, LAST, LAST, DONE]),
        ([[PING, ROLE, ERROR, DONE], [PING, ROLE, LAST, DONE]], [PING, PING, ROLE, LAST, DONE]),
        ([[ROLE, ERROR, DONE]] * 3, [ROLE, ERROR, DONE]),
        ([[ROLE, TOKEN, ERROR, DONE]], [ROLE, TOKEN, ERROR, DONE]),
        ([[REFUSED, DONE]], [REFUSED, DONE]),
        ([[ROLE]], [ROLE]),
        ([[]], []),
    ],
    ids=("whole", "again", "two choices", "kept alive", "in vain", "after a token", "refused", "cut off", "nothing"),
)
def test_streams(streams: list[list[str]], expected: list[str]) -> None:
    assert streamed(*streams) == (expected, len(streams))
