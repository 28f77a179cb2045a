"""Ask every question at every ratio, after a look at whether the server compresses at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from benchmarks.public.answers import Answers, ratio_name
from benchmarks.public.formats import Question, find_video
from benchmarks.public.prompts import prompt
from score_vllm.client import (
    Endpoint,
    NotCompressed,
    RequestFailed,
    chat_body,
    compressed_lengths,
    user_message,
    video_url,
)

SEND = ("file", "base64", "url")
# Which of LLaVA-Video's newlines stay: every row's, or those of rows that keep a token (FastVID's and HoliTom's rule).
NEWLINES = ("all", "kept-rows")
PROBED_VIDEOS = 5


@dataclass(frozen=True)
class Videos:
    """How videos reach the server.

    Attributes:
        root: folder of the videos here.
        send: "file" (a file:// URL that the server opens), "base64" (inside the request) or "url".
        prefix: for "url" the URL that replaces ``root``; for "file" the same folder as the server sees it, or None.
    """

    root: Path
    send: str
    prefix: str | None = None

    def url(self, path: Path) -> str:
        """The address of one video; raises OSError where it cannot be read."""
        if self.prefix is None:
            return video_url(path, self.send)
        prefix = self.prefix.rstrip("/")
        start = prefix if self.send == "url" else f"file://{quote(prefix)}"
        return f"{start}/{quote(path.relative_to(self.root).as_posix())}"


@dataclass(frozen=True)
class Plan:
    """What is asked, and how.

    Attributes:
        name: the set.
        questions: in the order in which they are asked.
        ratios: each question is asked once per ratio; None leaves it to the server.
        model, method, variant, max_tokens: of every request (``variant`` chooses the prompt).
        max_failures: the run stops after this many failed requests; what was answered is kept.
        videos: where they are, and how they are sent.
        reading: score-serve's ``video_fps`` and ``video_max_frames``, where they are asked for.
    """

    name: str
    questions: Sequence[Question]
    ratios: Sequence[float | None]
    model: str
    method: str | None
    variant: str
    max_tokens: int
    max_failures: int
    videos: Videos
    reading: Mapping[str, float] = field(default_factory=dict)

    async def body(self, question: Question, path: Path, ratio: float | None) -> dict[str, Any]:
        """The request about one question, greedy; the video is read here and not earlier.

        Raises:
            RequestFailed: the video cannot be read.
        """
        system, text = prompt(self.name, question, self.variant)
        try:
            url = await asyncio.to_thread(self.videos.url, path)
        except OSError as error:
            raise RequestFailed(f"the video cannot be read: {error}") from error
        messages = [] if system is None else [{"role": "system", "content": system}]
        return chat_body(
            self.model,
            [*messages, user_message(url, text)],
            max_tokens=self.max_tokens,
            retention_ratio=ratio,
            retention_method=self.method,
            **self.reading,
        )


async def probe(client: Endpoint, plan: Plan) -> dict[str, Any]:
    """Ask one question at every ratio, to see whether the server compresses (:func:`compressed_lengths`).

    Returns:
        The question's id and prompt tokens by ratio; empty where no ratio below 1 is asked or no video is there.

    Raises:
        NotCompressed: it does not.
        RequestFailed: none of the first five videos could be asked about.
    """
    ratios = sorted({ratio for ratio in plan.ratios if ratio is not None and ratio < 1})
    root = plan.videos.root
    found = {q.video: (q, path) for q in reversed(plan.questions) if (path := find_video(root, q)) is not None}
    problem = None
    for question, path in list(reversed(found.values()))[:PROBED_VIDEOS] if ratios else []:
        try:
            lengths = await compressed_lengths(client, await plan.body(question, path, ratios[0]), ratios)
        except NotCompressed:
            raise
        except RequestFailed as error:
            problem = error
            continue
        return {"question": question.id, "prompt_tokens": {ratio_name(r): lengths[r] for r in sorted(lengths)}}
    if problem is not None:
        raise RequestFailed(f"no answer about any of the first {PROBED_VIDEOS} videos: {problem}")
    return {}


async def ask_one(client: Endpoint, plan: Plan, question: Question, ratio: float | None) -> dict[str, Any]:
    """The record of one request, for :class:`Answers`."""
    record: dict[str, Any] = {"ratio": ratio_name(ratio), "id": question.id}
    path = find_video(plan.videos.root, question)
    if path is None:
        places = ", ".join(str(plan.videos.root / folder) for folder in question.folders)
        return record | {"status": "failed", "error": f"video {question.video!r} not found in {places}"}
    try:
        reply = await client.chat(await plan.body(question, path, ratio))
    except RequestFailed as error:
        return record | {"status": "failed", "error": str(error), "asked": True}
    return record | {
        "status": "answered",
        "text": reply.text or "",
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "finish_reason": reply.finish_reason,
        "method": (reply.score or {}).get("method"),
    }


async def ask_all(client: Endpoint, plan: Plan, answers: Answers, concurrency: int) -> bool:
    """Ask what has no answer yet, with a progress bar; every answer is in the file as soon as it came.

    Returns:
        False where the run was stopped by ``max_failures``.
    """
    todo = [
        (question, ratio)
        for question in plan.questions
        for ratio in plan.ratios
        if not answers.answered(ratio_name(ratio), question.id)
    ]
    work = iter(todo)
    total = len(plan.questions) * len(plan.ratios)
    failures = 0

    async def worker(progress: tqdm) -> None:
        nonlocal failures
        for question, ratio in work:
            record = await ask_one(client, plan, question, ratio)
            # A missing file is named as often as it is asked about; it says nothing about the server.
            failures += record.pop("asked", False)
            answers.add(record)
            progress.update()
            progress.set_postfix({"failed": failures} if failures else {}, refresh=False)
            if failures >= plan.max_failures:
                return

    with tqdm(total=total, initial=total - len(todo), desc=plan.name, unit="request") as progress:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker(progress))
    return failures < plan.max_failures or next(work, None) is None
