"""Load test: vanilla vLLM and SCORE under the same arrivals, one server after the other. docs/benchmarks.md says
how to read it.

    python -m benchmarks.serving.load             # 20 to 30 minutes on two quiet cores
    python -m benchmarks.serving.load --quick

For each configuration (vanilla, each ratio, and all ratios mixed) a server is started, checked against vanilla's
answers at ratio 1, warmed, and given the same requests at each concurrency: the same clips and questions in the same
order, no clip twice within a level, every cache off. Every answer is checked as it comes: its tokens, its prompt's
exact length, the server's report of retained tokens. Ends with 1 if any request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import at_least, integers, ratios, row_name
from benchmarks.serving.aggregate import aggregate
from benchmarks.serving.client import Counts, Request, stream
from benchmarks.serving.monitoring import Monitor
from benchmarks.serving.server import SERVED_NAME, Server, running
from benchmarks.serving.setup import Setup, answers_of, check_ratio_one, parse, prepare, serving_parser
from score_vllm.client import Client


@dataclass(frozen=True)
class Config:
    """One row of servers: a name, the kind of server, the ratios that its requests ask for in turn."""

    name: str
    kind: str
    ratios: tuple[float | None, ...]


def configurations(ratios: Sequence[float]) -> list[Config]:
    """Vanilla first, each ratio, and at last all of them mixed with ratio 1 (where there are several)."""
    made = [Config("vanilla", "vanilla", (None,))]
    made += [Config(row_name(ratio), "score", (ratio,)) for ratio in ratios]
    if len(ratios) > 1:
        made.append(Config("SCORE mixed", "score", (1.0, *ratios)))
    return made


def question(index: int) -> str:
    """A text of the same number of bytes for every index below 10,000: prompts have one length."""
    return f"Request {index:04d}: what happens?"


def make_requests(
    counts: Counts,
    clips: Sequence[Path],
    ratios: Sequence[float | None],
    count: int,
    first: int = 0,
    max_tokens: int = 16,
) -> list[Request]:
    """The requests of one level, each with the exact token counts that its answer must report.

    Args:
        counts: of every clip.
        clips: at least ``count``: no request repeats another's video.
        ratios: dealt out in turn; None is vanilla, which has no ratio.
        count: how many.
        first: index of the first, so that levels do not repeat each other's questions.
        max_tokens: generated per request.

    Raises:
        ValueError: fewer clips than requests, or no ratio.
    """
    if len(clips) < count:
        raise ValueError(f"{count} requests need as many clips, got {len(clips)}")
    if not ratios:
        raise ValueError("ratios must not be empty")
    return [
        Request(clips[i].as_uri(), question(first + i), max_tokens, ratios[i % len(ratios)], counts)
        for i in range(count)
    ]


async def run_users(client: Client, model: str, requests: Sequence[Request], users: int) -> list[dict[str, Any]]:
    """Send requests in a closed loop: each user sends the next one as soon as its last is answered.

    Returns:
        A record per request, in order: ratio, times in seconds, counts, and what was wrong with it, or None.
    """
    records: dict[int, dict[str, Any]] = {}
    work = iter(enumerate(requests))

    async def user() -> None:
        for number, request in work:
            answer = await stream(client, model, request)
            records[number] = {
                "retention_ratio": request.ratio,
                "sent": answer.sent,
                "end": answer.end,
                "ttft": answer.ttft if answer.arrivals else None,
                "itl": answer.gaps(),
                "prompt_tokens": answer.usage.get("prompt_tokens"),
                "completion_tokens": answer.tokens,
                "error": answer.problem(request),
            }

    await asyncio.gather(*(user() for _ in range(users)))
    return [records[number] for number in sorted(records)]


def run_level(
    url: str, model: str, requests: Sequence[Request], users: int, api_key: str | None = None, timeout: float = 900
) -> tuple[list[dict[str, Any]], float]:
    """Records of :func:`run_users`, and the client's CPU seconds."""

    async def run() -> list[dict[str, Any]]:
        async with Client(f"{url}/v1", api_key, timeout=timeout) as client:
            return await run_users(client, model, requests, users)

    before = time.process_time()
    records = asyncio.run(run())
    return records, time.process_time() - before


def requests_of(users: int, args: argparse.Namespace) -> int:
    """Requests of a level: enough for a tail, a multiple of the users so that they end together."""
    return users * max(args.per_user, -(-args.minimum // users))


def run_config(server: Server, config: Config, counts: Counts, setup: Setup) -> list[dict[str, Any]]:
    """Every concurrency on one server; a row each."""
    args, clips, rows, first = setup.args, setup.clips[2:], [], 0
    for users in tqdm(args.concurrency, desc=config.name, unit="level"):
        count = requests_of(users, args)
        requests = make_requests(counts, clips, config.ratios, count, first, args.max_tokens)
        first += count
        with Monitor(server) as monitor:
            records, client_seconds = run_level(server.url, SERVED_NAME, requests, users)
        row = aggregate(records, count)
        rows.append(
            {
                "config": config.name,
                "retention_ratios": [1.0 if ratio is None else ratio for ratio in config.ratios],
                "concurrency": users,
                **row,
                "peak_rss_bytes": monitor.peak_rss,
                "peak_kv_cache_share": monitor.peak_kv,
                "client_cpu_share": client_seconds / row["seconds"],
                "errors": [record["error"] for record in records if record["error"] is not None][:3],
            }
        )
        tqdm.write(f"  {config.name}, concurrency {users}: {row['requests_per_second']:.2f} requests/s")
    return rows


def main() -> None:
    parser = serving_parser(__doc__, frames=16)
    add = parser.add_argument
    add("--ratios", type=ratios, default="0.4,0.25,0.1", help="with commas between (default %(default)s)")
    add("--concurrency", type=integers, default="1,2,4,8,16,32", help="users, with commas between")
    add("--max-tokens", type=at_least(1), default=16, help="generated per request")
    add("--per-user", type=at_least(1), default=2, help="requests per user and level, at least")
    add("--minimum", type=at_least(1), default=8, help="requests per level, at least")
    args = parse(parser, max_tokens=4, ratios=[0.1], concurrency=[1, 2], minimum=2)
    most = max(requests_of(users, args) for users in args.concurrency)
    setup = prepare("load", args, most + 2, args.max_tokens)
    checks = [clip.as_uri() for clip in setup.clips[:2]]
    visual = args.shape.visual_tokens

    rows: list[dict[str, Any]] = []
    plain = []
    counts: Counts | None = None
    for config in configurations(args.ratios):
        with running(config.kind, setup.options, setup.folder) as server:
            if counts is None:
                plain = answers_of(server, checks, None, question(0))
                counts = Counts(visual, plain[0].usage["prompt_tokens"] - visual)
            else:
                if check_ratio_one(plain, answers_of(server, checks, 1.0, question(0))) != counts:
                    sys.exit("correctness check failed: the processor resized the clips; choose another size")
                for ratio in config.ratios:
                    answers_of(server, checks, ratio)  # warms what the ratio needs
            rows += run_config(server, config, counts, setup)

    setup.publish(rows)
    if failures := sum(row["failures"] for row in rows):
        sys.exit(f"{failures} requests failed; logs in {setup.folder}")


if __name__ == "__main__":
    main()
