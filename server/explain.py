"""``score_explain``: which tokens of each video were kept, asked of the workers that selected them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from score_vllm.models.selections import MAX_INDICES, MAX_VIDEOS
from score_vllm.server.context import RequestContext, ServerState

logger = logging.getLogger(__name__)

# A worker answers between two steps of its engine.
ANSWER_SECONDS = 30.0
GONE = (
    f"no worker holds this selection any more: the video came out of a cache, and selections of the last {MAX_VIDEOS} "
    f"videos are held, {MAX_INDICES} kept tokens in all"
)
NO_ANSWER = "the workers did not answer; the server's log says why"


async def ask_workers(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """What each worker of each engine answers; vLLM's own ``collective_rpc`` answers for the first engine alone."""
    engines = await engine_client.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
    return [answer for workers in engines for answer in workers]


async def explained(score: dict[str, Any], state: ServerState, context: RequestContext) -> dict[str, Any]:
    """The ``score`` object of a response, with selections where the request asks for them."""
    if context.explain and context.reports:
        await _add_selections(score["videos"], context, state.engine_client)
    return score


async def _add_selections(videos: list[dict[str, Any]], context: RequestContext, engine_client: Any) -> None:
    reports, missing = context.reports, GONE
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            answers = await ask_workers(engine_client, "score_selections", [report.identity for report in reports])
    except Exception:  # the answer to the question itself is there, and is sent
        logger.exception("score_explain: the workers did not answer")
        answers, missing = [], NO_ANSWER
    for index, (video, report) in enumerate(zip(videos, reports, strict=True)):
        found = next((answer[index] for answer in answers if answer[index] is not None), None)
        video["cell_seconds"] = report.cell_seconds
        video |= found or {"kept_per_cell": None, "kept_mask": None, "kept_missing": missing}
