"""Requests that the engine gave back unanswered are sent again.

vLLM keeps processed videos twice, before the engine and in it, and sends only what it believes to be new. A client that
leaves at the wrong moment makes the two differ; the engine then ends the next request about that video with an error,
says what it lacks, and means the request to be sent again: then it comes whole. A client would see a 500, or an error
in its stream. Failures of transferred KV blocks end the same way.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from vllm.exceptions import GenerationError

# The log of requests has a handler.
logger = logging.getLogger("score_vllm.requests")

# Others may leave at the wrong moment meanwhile.
TRIES = 3
# Of the message that vLLM has for an engine's error, whose cause only its log names.
ENGINE_ERROR = "Internal server error"

T = TypeVar("T")


async def answered(attempt: Callable[[], Awaitable[T]]) -> T:
    """What an attempt returns, the engine's error being a reason for another one.

    Raises:
        GenerationError: of the last attempt.
    """
    for left in reversed(range(TRIES)):
        try:
            return await attempt()
        except GenerationError as error:
            if not left or str(error) != ENGINE_ERROR:
                raise
            logger.warning("the engine gave a request back unanswered; it is sent again")
    raise AssertionError


async def streamed(
    events: AsyncIterable[Any], attempt: Callable[[], Awaitable[AsyncIterable[Any]]]
) -> AsyncIterator[Any]:
    """The events of a stream; those of another attempt where the engine's error comes before the first token.

    The chunks that only say who speaks come with the first token, or with that error; they wait for it.
    """
    for left in reversed(range(TRIES)):
        held: list[Any] | None = []
        failed = False
        async for event in events:
            text = event if isinstance(event, str) else bytes(event).decode()
            if held is None:
                yield event
            elif left and text.startswith('data: {"error"') and ENGINE_ERROR in text:
                failed = True
                break
            elif '"role":"assistant"' in text and '"finish_reason":null' in text:
                held.append(event)
            elif not text.startswith("data: "):
                yield event  # keeps the connection alive
            else:
                for earlier in (*held, event):
                    yield earlier
                held = None
        if not failed:
            for earlier in held or ():
                yield earlier
            return
        logger.warning("the engine gave a request back unanswered; it is sent again")
        events = await attempt()
