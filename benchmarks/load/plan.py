"""The arrivals of a load test, written once and replayed against every server; and the run of locust over them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        url: of the server, without a path.
        model: served name.
        original_tokens: visual tokens of a clip before compression; all clips have the same shape.
        text_tokens: the rest of the prompt.
        api_key: None where the server wants none.
    """

    url: str
    model: str
    original_tokens: int
    text_tokens: int
    api_key: str | None = None


def question(index: int) -> str:
    """A text of the same number of bytes for every index below 10,000: prompts have one length."""
    return f"Request {index:04d}: what happens?"


def make_requests(
    target: Target, clips: Sequence[Path], ratios: Sequence[float | None], count: int, first: int = 0
) -> list[dict[str, Any]]:
    """The requests of one level, each with the exact token counts that its answer must report.

    Args:
        target: counts per clip come from here.
        clips: at least ``count``: no request repeats another's video.
        ratios: dealt out in turn; None is vanilla, which has no ratio.
        count: how many.
        first: index of the first, so that levels do not repeat each other's questions.

    Raises:
        ValueError: fewer clips than requests, or no ratio.
    """
    from score_vllm import num_retained_tokens

    if len(clips) < count:
        raise ValueError(f"{count} requests need as many clips, got {len(clips)}")
    if not ratios:
        raise ValueError("ratios must not be empty")
    made = []
    for i in range(count):
        ratio = ratios[i % len(ratios)]
        kept = None if ratio is None else num_retained_tokens(target.original_tokens, ratio)
        prompt = target.text_tokens + (target.original_tokens if kept is None else kept)
        made.append(
            {
                "id": first + i,
                "clip": str(clips[i]),
                "text": question(first + i),
                "retention_ratio": ratio,
                "prompt_tokens": prompt,
                "retained_tokens": kept,
            }
        )
    return made


def run_locust(
    target: Target,
    requests: Sequence[dict[str, Any]],
    concurrency: int,
    folder: Path,
    max_tokens: int,
    media: str = "file",
    timeout: float = 900,
) -> tuple[list[dict[str, Any]], float]:
    """Replay requests in a closed loop of ``concurrency`` users.

    Args:
        target: the server.
        requests: of :func:`make_requests`.
        concurrency: users at once, each with one request in flight.
        folder: for the plan, the records, locust's log and its own statistics (``locust.json``).
        max_tokens: generated per request.
        media: ``file`` (the server reads the clip) or ``data`` (it travels in the request).
        timeout: seconds without a byte after which a request has failed.

    Returns:
        ``(records, client CPU seconds)``.

    Raises:
        RuntimeError: locust did not run, or left no records; its log is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, records, log = folder / "plan.json", folder / "records.jsonl", folder / "locust.log"
    common = {"model": target.model, "max_tokens": max_tokens, "media": media, "timeout": timeout}
    plan.write_text(json.dumps({"common": {**common, "api_key": target.api_key}, "requests": list(requests)}))
    records.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--host", target.url]
    command += ["-u", str(concurrency), "-r", "1000", "--plan", str(plan), "--records", str(records)]
    # Its CSV files lack what came after the last interval; --json prints the final statistics.
    command += ["--json", "--stop-timeout", "60"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit = 60 + timeout * len(requests)
    with log.open("wb") as sink, (folder / "locust.json").open("wb") as statistics:
        try:
            done = subprocess.run(command, stdout=statistics, stderr=sink, timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"locust did not end within {limit:g} s (log: {log})") from error
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = [json.loads(line) for line in records.read_text().splitlines()] if records.is_file() else []
    # 1 is locust's word for "some requests failed": the records say which.
    if done.returncode not in (0, 1) or not found:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"locust ended with {done.returncode} and {len(found)} records (log: {log}):\n{tail}")
    return found, (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
