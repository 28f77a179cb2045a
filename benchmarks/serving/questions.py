"""Several questions about each of a few clips, each at another ratio: throughput with the cell cache and without.

    python -m benchmarks.serving.questions             # a quarter of an hour on two quiet cores
    python -m benchmarks.serving.questions --quick
    python -m benchmarks.serving.questions --soak 500  # distinct clips against a small cache: does it hold its bound?

A server without the cache, one with it, and the same again in the other order; every other cache is off. In every run
the same requests go out through locust. Afterwards each clip is asked about once more, alone: these answers must be the
same in every run. Ends with 1 if any request failed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from benchmarks.clips import write_clips
from benchmarks.harness import at_least, ratios
from benchmarks.serving.aggregate import aggregate
from benchmarks.serving.client import Counts, Request, ask
from benchmarks.serving.load import question, run_level
from benchmarks.serving.monitoring import tree_rss
from benchmarks.serving.server import SERVED_NAME, Server, running
from benchmarks.serving.setup import Setup, answers_of, parse, prepare, serving_parser

NAMES = ("cache off", "cache on")
CELLS = ("score_encoded_cells_total", "score_reused_cells_total")


def make_requests(setup: Setup, counts: Counts) -> list[Request]:
    """Question by question, clip by clip; of one clip every question at another ratio, as far as there are ratios."""
    args = setup.args
    return [
        Request(clip.as_uri(), question(number), args.max_tokens, args.ratios[(i + number) % len(args.ratios)], counts)
        for number in range(args.questions)
        for i, clip in enumerate(setup.clips)
    ]


def counts_of(server: Server, setup: Setup) -> Counts:
    """Tokens of a prompt, as the server counts them for a clip that is not among those asked about."""
    (other,) = write_clips(setup.options.media, setup.args.shape, [len(setup.clips)])
    (answer,) = answers_of(server, [other.as_uri()], 1.0, question(0))
    visual = setup.args.shape.visual_tokens
    return Counts(visual, answer.usage["prompt_tokens"] - visual)


def run_server(name: str, setup: Setup) -> tuple[dict[str, Any], list[list[int]]]:
    """One run: its row, and the tokens of each clip's last answer."""
    args = setup.args
    options = replace(setup.options, cell_cache_gib=args.cell_cache_gib * (name == "cache on"))
    with running("score", options, setup.folder) as server:
        requests = make_requests(setup, counts_of(server, setup))
        before = server.metrics()
        records = run_level(server.url, SERVED_NAME, requests, args.users, setup.folder)
        after = server.metrics()
        encoded, reused = (int(after[key] - before[key]) for key in CELLS)
        answers = answers_of(server, [clip.as_uri() for clip in setup.clips], args.ratios[0])
    row = {"encoded_cells": encoded, "reused_cells": reused, **aggregate(records, len(requests))}
    print(f"  {name}: {row['requests_per_second']:.2f} requests/s, {encoded} of {encoded + reused} cells encoded")
    return row, [answer.ids for answer in answers]


def compare(setup: Setup) -> None:
    """Both servers in both orders, and the results."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    known: list[list[int]] | None = None
    for name in (*NAMES, *NAMES[::-1]):
        row, answers = run_server(name, setup)
        runs[name].append(row)
        if known not in (None, answers):
            sys.exit("correctness check failed: with the cache and without it the answers differ")
        known = answers
    rows = []
    for name, found in runs.items():
        mean = sum(row["requests_per_second"] for row in found) / len(found)
        rows.append({"row": name, **found[0], "requests_per_second": mean, "runs": found})
    setup.publish(rows)
    if failures := sum(row["failures"] for found in runs.values() for row in found):
        sys.exit(f"{failures} requests failed; logs in {setup.folder}")


def soak(setup: Setup, clips: int) -> None:
    """Ask about distinct clips one by one, and watch what the cache holds.

    Raises:
        SystemExit: it held more than its bound, did not fill, or an old clip was not forgotten.
    """
    args = setup.args
    bound, most, resident = args.cell_cache_gib * 2**30, 0.0, []
    with running("score", replace(setup.options, cell_cache_gib=args.cell_cache_gib), setup.folder) as server:
        for seed in tqdm(range(clips), desc="clips", unit="clip"):
            (clip,) = write_clips(setup.options.media, args.shape, [seed])
            answers_of(server, [clip.as_uri()], args.ratios[0])
            most = max(most, server.metrics()["score_cell_cache_bytes"])
            if most > bound:
                sys.exit(f"the cache holds {most:.0f} bytes, more than {bound:.0f}, after {seed + 1} clips")
            resident.append(tree_rss(server.process.pid))
        cells = args.frames // 2
        for seed, expected in ((clips - 1, 0), (0, cells)):
            (path,) = write_clips(setup.options.media, args.shape, [seed])
            request = Request(path.as_uri(), question(1), 1, args.ratios[0])
            (video,) = (ask(server.url, SERVED_NAME, [request])[0].score or {})["videos"]
            if video["encoded_cells"] != expected:
                sys.exit(f"clip {seed} of {clips} encoded {video['encoded_cells']} cells instead of {expected}")
    if most < 0.9 * bound:
        sys.exit(f"the cache held {most:.0f} of {bound:.0f} bytes: too few clips to reach its bound")
    half, end = resident[clips // 2], resident[-1]
    mib = 2**20
    print(
        f"{clips} distinct clips: at most {most / mib:.1f} of {bound / mib:.1f} MiB in the cache, oldest forgotten; "
        f"the server's resident memory: {half / mib:.0f} MiB after half of them, {end / mib:.0f} MiB at the end"
    )


def main() -> None:
    parser = serving_parser(__doc__, frames=32)
    add = parser.add_argument
    add("--clips", type=at_least(1), default=8, help="distinct clips (default %(default)s)")
    add("--questions", type=at_least(1), default=4, help="about each clip (default %(default)s)")
    add("--users", type=at_least(1), default=16, help="at once (default %(default)s)")
    add("--ratios", type=ratios, default="0.4,0.25,0.1,0.05", help="one after the other (default %(default)s)")
    add("--max-tokens", type=at_least(1), default=16, help="generated per request")
    add("--cell-cache-gib", type=float, default=None, help="default 1; with --soak a third of what the clips need")
    add("--soak", type=at_least(4), default=None, metavar="N", help="N distinct small clips, one after the other")
    args = parse(parser, clips=2, users=2, max_tokens=4)
    if args.soak:
        soak_arguments(args)
    elif args.cell_cache_gib is None:
        args.cell_cache_gib = 1.0
    setup = prepare("questions", args, 0 if args.soak else args.clips, args.max_tokens)
    if args.soak:
        soak(setup, args.soak)
    else:
        compare(setup)


def soak_arguments(args: argparse.Namespace) -> None:
    """Small clips, and a cache that a third of them fill."""
    from benchmarks.clips import ClipShape
    from benchmarks.serving.model import TEXT_CONFIG

    args.frames, args.height, args.width = 8, 112, 112
    args.shape = ClipShape(args.frames, args.height, args.width)
    if args.cell_cache_gib is None:
        per_clip = args.shape.visual_tokens * TEXT_CONFIG["hidden_size"] * 4
        args.cell_cache_gib = round(args.soak * per_clip / 3 / 2**30, 4)


if __name__ == "__main__":
    main()
