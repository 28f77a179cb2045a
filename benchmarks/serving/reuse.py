"""The cases of ``ttft_stages --reuse``: requests whose temporal cells have been encoded before, wholly or in part.

Three servers run side by side: vanilla, SCORE without a cell cache, SCORE with one. Per repeat, on clips of its own:

* ``cold``: a clip that nobody has seen, also without the cache;
* ``another ratio``: the same clip;
* ``asked again``: the same clip at the first ratio, by a server whose other caches are off;
* ``window slides``: two seconds further in the file that the clip was cut from (``video_start``, ``video_end``);
* ``window slides, files``: two seconds further still, as a file of its own, cut without encoding again;
* ``clip grows``: a file that was asked about when it was two seconds shorter;
* ``slide show``: cold, one picture for several cells.

How many cells each must encode is worked out from the decoded pixels and compared with the server's report; after each
timed request its answer is compared with that of the server without a cache. Vanilla is asked about the first clip: all
have the same length.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.clips import FPS, ClipShape
from benchmarks.serving.client import Answer, Counts, Request, ask
from benchmarks.serving.reuse_clips import CUT_SECONDS, cells_of, cut, write_slides, write_source
from benchmarks.serving.server import SERVED_NAME, Server, running
from benchmarks.serving.setup import CHECK_TOKENS, QUESTION, Setup, answers_of, check_ratio_one
from benchmarks.serving.stage_split import SpanReader
from benchmarks.serving.ttft_stages import measure, summarise

# The servers, and the kind of each.
SERVERS = {"vanilla": "vanilla", "cache off": "score", "cache on": "score"}
SLIDES = 5


@dataclass(frozen=True)
class Step:
    """One request of a repeat.

    Attributes:
        row: of the results; None: not timed, what came before.
        server: out of :data:`SERVERS`.
        path: of the clip.
        ratio: None is vanilla.
        window: seconds of the clip.
    """

    row: str | None
    server: str
    path: Path
    ratio: float | None
    window: tuple[float, float] | None = None


def make_steps(folder: Path, shape: ClipShape, seed: int, ratio: float, other: float) -> list[Step]:
    """The requests of one repeat, in order; writes its clips."""
    seconds, move = shape.frames / FPS, CUT_SECONDS
    longer = replace(shape, frames=shape.frames + 2 * move * FPS)
    source = write_source(folder / f"source-{seed}.mp4", longer, seed)
    growing = write_source(folder / f"growing-{seed}.mp4", shape, seed + 500)
    slides = write_slides(folder / f"slides-{seed}.mp4", shape, min(SLIDES, shape.frames // 4), seed)
    first = cut(source, 0, seconds)
    return [
        Step("vanilla", "vanilla", first, None),
        Step("cold, cache off", "cache off", first, ratio),
        Step("cold", "cache on", first, ratio),
        Step("another ratio", "cache on", first, other),
        Step("asked again", "cache on", first, ratio),
        Step("window slides", "cache on", source, ratio, (move, move + seconds)),
        Step("window slides, files", "cache on", cut(source, 2 * move, 2 * move + seconds), ratio),
        Step(None, "cache on", cut(growing, 0, seconds - move), ratio),
        Step("clip grows", "cache on", growing, ratio),
        Step("slide show", "cache on", slides, ratio),
    ]


class Expected:
    """How many cells a server with a cache of every cell must encode."""

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames
        self._seen: set[str] = set()

    def count(self, step: Step) -> tuple[int, int]:
        """``(to encode, of the video)``; the step counts as done."""
        cells = cells_of(step.path, self._max_frames, step.window)
        if step.server != "cache on":
            return len(cells), len(cells)
        new = set(cells) - self._seen
        self._seen |= new
        return len(new), len(cells)


def check_cells(step: Step, answer: Answer, encoded: int, cells: int) -> None:
    """The server's report against ours.

    Raises:
        SystemExit: they differ.
    """
    (video,) = (answer.score or {})["videos"]
    found = video["encoded_cells"], video["encoded_cells"] + video["reused_cells"]
    if found != (encoded, cells):
        sys.exit(f"correctness check failed: {step} encoded {found[0]} of {found[1]} cells, not {encoded} of {cells}")


def check_answer(servers: dict[str, Server], request: Request) -> None:
    """With and without the cache the answer is the same.

    Raises:
        SystemExit: it is not.
    """
    longer = replace(request, max_tokens=CHECK_TOKENS)
    one, other = (ask(servers[name].url, SERVED_NAME, [longer])[0] for name in ("cache on", "cache off"))
    if one.ids != other.ids:
        sys.exit(f"correctness check failed: with the cache {one.ids}, without it {other.ids}, for {longer}")


def start_and_measure(
    names: Sequence[str], setup: Setup, base: str, seeds: Sequence[int], runs: dict[str, list[dict[str, Any]]]
) -> Counts:
    """All servers, started in this order and checked; then every repeat, its requests one after the other."""
    args, media = setup.args, setup.options.media
    servers, readers = {}, {}
    with contextlib.ExitStack() as stack:
        for name in names:
            place = Path(tempfile.mkdtemp(prefix="spans-", dir=setup.folder))
            options = replace(setup.options, spans=place, cell_cache_gib=args.cell_cache_gib * (name == "cache on"))
            readers[name] = SpanReader(place)
            servers[name] = stack.enter_context(running(SERVERS[name], options, setup.folder))
        checks = [f"{base}/{path.name}" for path in setup.clips]
        plain = answers_of(servers["vanilla"], checks, None)
        for name in ("cache off", "cache on"):
            counts = check_ratio_one(plain, answers_of(servers[name], checks, 1.0))
            for ratio in args.ratios:
                answers_of(servers[name], checks, ratio)  # warms what the ratio needs
        expected = Expected(args.frames)
        for seed in tqdm(seeds, desc="repeats", unit="repeat"):
            for step in make_steps(media, args.shape, seed, *args.ratios):
                encoded, cells = expected.count(step)
                known = counts if 2 * cells == args.frames else None
                request = Request(f"{base}/{step.path.name}", QUESTION, 1, step.ratio, known, step.window)
                run, answer = measure(servers[step.server], readers[step.server], request)
                if step.ratio is not None:
                    check_cells(step, answer, encoded, cells)
                if step.server == "cache on":
                    check_answer(servers, request)
                if step.row is not None:
                    runs.setdefault(step.row, []).append({**run, "cells": (encoded, cells), "ratio": step.ratio})
    return counts


def run(setup: Setup, args: argparse.Namespace, base: str) -> None:
    """Half of the repeats with the servers started in one order, half in the other."""
    runs: dict[str, list[dict[str, Any]]] = {}
    seeds = range(1, args.repeats + 1)
    half = -(-len(seeds) // 2)
    for names, part in zip((list(SERVERS), list(SERVERS)[::-1]), (seeds[:half], seeds[half:]), strict=True):
        if part:
            counts = start_and_measure(names, setup, base, part, runs)
    rows = []
    for row, found in runs.items():
        cells = sorted({one["cells"] for one in found})
        rows.append({**summarise(found[0]["ratio"], counts, found), "row": row, "encoded_of_cells": cells})
    setup.publish(rows, download="HTTP over the loopback")
