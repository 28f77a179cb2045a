"""Load test: vanilla vLLM and SCORE under the same arrivals, one server after the other. docs/benchmarks.md says
how to read it.

    python -m benchmarks.serving.load             # 20 to 30 minutes on two quiet cores
    python -m benchmarks.serving.load --quick
    python -m benchmarks.serving.load --crosscheck    # with vLLM's bench serve; a few minutes

For each configuration (vanilla, each ratio, and all ratios mixed) a server is started, checked against vanilla's
answers at ratio 1, warmed, and given the same requests by locust (locustfile.py) at each concurrency: the same clips
and questions in the same order, no clip twice within a level, every cache off. Every answer is checked as it comes: its
tokens, its prompt's exact length, the server's report of retained tokens. Ends with 1 if any request failed.
``--crosscheck`` gives the requests of vanilla and one ratio to ``bench serve`` too, and compares what both clients saw.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import at_least, integers, ratios, row_name
from benchmarks.serving.aggregate import aggregate
from benchmarks.serving.bench_serve import crosscheck
from benchmarks.serving.client import Counts, Request, write_requests
from benchmarks.serving.monitoring import Monitor
from benchmarks.serving.process import tail
from benchmarks.serving.server import SERVED_NAME, Server, running
from benchmarks.serving.setup import Setup, answers_of, check_ratio_one, parse, prepare, serving_parser

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


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


def run_level(
    url: str, model: str, requests: Sequence[Request], users: int, folder: Path, api_key: str = ""
) -> list[dict[str, Any]]:
    """Send requests through locust in a closed loop of users; the records of ``locustfile.py``, in order.

    Raises:
        RuntimeError: locust failed; its log is named.
    """
    folder = Path(tempfile.mkdtemp(prefix="locust-", dir=folder))
    plan, records, log = folder / "requests.json", folder / "records.jsonl", folder / "locust.log"
    write_requests(plan, requests)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", "--host", url]
    command += ["--users", str(users), "--spawn-rate", str(users), "--exit-code-on-error", "0"]
    command += ["--served-model", model, "--requests", str(plan), "--records", str(records)]
    with log.open("wb") as sink:
        env = {**os.environ, "LOCUST_API_KEY": api_key}
        code = subprocess.run(command, env=env, stdout=sink, stderr=subprocess.STDOUT, cwd=folder).returncode
    if code or not records.is_file():
        raise RuntimeError(f"locust ended with {code} (log: {log}):\n{tail(log)}")
    return sorted(map(json.loads, records.read_text().splitlines()), key=lambda record: record["number"])


def requests_of(users: int, args: argparse.Namespace) -> int:
    """Requests of a level: enough for a tail, a multiple of the users so that they end together."""
    return users * max(args.per_user, -(-args.minimum // users))


def run_config(server: Server, config: Config, counts: Counts, setup: Setup) -> list[dict[str, Any]]:
    """Every concurrency on one server; a row each, or with ``--crosscheck`` one per client."""
    args, clips, rows, first = setup.args, setup.clips[2:], [], 0
    for users in tqdm(args.concurrency, desc=config.name, unit="level"):
        count = requests_of(users, args)
        requests = make_requests(counts, clips, config.ratios, count, first, args.max_tokens)
        first += count
        with Monitor(server) as monitor:
            records = run_level(server.url, SERVED_NAME, requests, users, setup.folder)
        row = aggregate(records, count)
        tqdm.write(f"  {config.name}, concurrency {users}: {row['requests_per_second']:.2f} requests/s")
        if args.crosscheck:
            folder = setup.folder / f"bench-serve-{config.kind}"
            common = {"config": config.kind, "retention_ratio": config.ratios[0]}
            both = crosscheck(server.url, setup.model.path, requests, users, folder, row)
            rows += [common | one for one in both]
            continue
        rows.append(
            {
                "config": config.name,
                "retention_ratios": [1.0 if ratio is None else ratio for ratio in config.ratios],
                "concurrency": users,
                **row,
                "peak_rss_bytes": monitor.peak_rss,
                "peak_kv_cache_share": monitor.peak_kv,
                "client_cpu_share": max(record["client_cpu"] for record in records) / row["seconds"],
                "errors": [record["error"] for record in records if record["error"] is not None][:3],
            }
        )
    return rows


def main() -> None:
    parser = serving_parser(__doc__, frames=16)
    add = parser.add_argument
    add("--ratios", type=ratios, default="0.4,0.25,0.1", help="with commas between (default %(default)s)")
    add("--concurrency", type=integers, default="1,2,4,8,16,32", help="users, with commas between")
    add("--max-tokens", type=at_least(1), default=16, help="generated per request")
    add("--per-user", type=at_least(1), default=2, help="requests per user and level, at least")
    add("--minimum", type=at_least(1), default=8, help="requests per level, at least")
    add("--crosscheck", action="store_true", help="24 requests of 4 users at the lowest ratio, by two clients")
    args = parse(parser, max_tokens=4, ratios=[0.1], concurrency=[1, 2], minimum=2)
    if args.crosscheck:
        args.ratios, args.concurrency, args.minimum = args.ratios[-1:], [4], 4 if args.quick else 24
    most = max(requests_of(users, args) for users in args.concurrency)
    setup = prepare("crosscheck" if args.crosscheck else "load", args, most + 2, args.max_tokens)
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

    if args.crosscheck:
        args.requests, args.concurrency = most, 4  # as the caption says them
    setup.publish(rows)
    if failures := sum(row["failures"] for row in rows):
        sys.exit(f"{failures} requests failed; logs in {setup.folder}")


if __name__ == "__main__":
    main()
