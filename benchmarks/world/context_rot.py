"""Does a reader answer worse when there is more to read, and does selecting help? On real footage.

    python -m benchmarks.world.context_rot --reader runs/reader --policies runs/footage-policies --family budget-matched

Held-out clips of 1 to 16 times the length that the reader was trained on, and with 0 to 8 look-alikes standing in the
picture, both with equally many events; and one length read through every s-th frame whole, or through the best tokens
of all frames. Positions are never new to the reader: it was trained with stretched ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import RESULTS, at_least, integers, ratios, script_parser
from benchmarks.report import publish
from benchmarks.world.accuracy import Candidate, HeldOut, candidates, everything, method_names
from benchmarks.world.footage import Reader, footage_clips, open_reader, paired
from score_vllm.train.world.composite import NUM_FRAMES
from score_vllm.train.world.composite_source import CompositeSource
from score_vllm.train.world.reader import record_of

CLUTTER = (0, 1, 2, 4, 8)
STRIDES = (1, 2, 4, 8, 16)
# One clip of 256 frames is read with 16,384 tokens: a few at a time.
TOKENS_AT_ONCE = 16384


def every(stride: int, clip: HeldOut) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of every ``stride``-th frame: a lower frame rate."""
    rows, indices = everything(clip)
    chosen = indices[(indices // clip.grid.tokens_per_frame) % stride == 0]
    return rows[chosen], chosen


def row(
    clips: Sequence[HeldOut], method: str, runs: Sequence[dict[str, Any]], plain: np.ndarray, **about: Any
) -> dict[str, Any]:
    """One point of a curve, beside what all tokens of the same clips give."""
    values = [run["accuracy"] for run in runs]
    right = np.mean([run["right"] for run in runs], axis=0)
    return {
        **about,
        "method": method,
        "accuracy": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "tokens": statistics.mean(run["achieved"] for run in runs) * clips[0].grid.num_tokens,
        "against_vanilla": paired(right, plain, clips),
        "questions": sum(len(clip.questions) for clip in clips),
    }


def curve(
    reader: Reader, clips: Sequence[HeldOut], named: dict[str, list[Candidate]], asked: Sequence[float], **about: Any
) -> list[dict[str, Any]]:
    """Vanilla and every family at every ratio on the same clips."""
    batch = max(1, TOKENS_AT_ONCE // clips[0].grid.num_tokens)
    plain = reader.ask(clips, everything, batch)
    rows = [row(clips, "vanilla", [plain], plain["right"], retention_ratio=1.0, **about)]
    for ratio in asked:
        for name, members in named.items():
            runs = [reader.ask(clips, partial(one.select, ratio=ratio), batch) for one in members]
            rows.append(row(clips, name, runs, plain["right"], retention_ratio=ratio, **about))
    return rows


def main() -> None:
    """Command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--reader", type=Path, default=Path("runs/reader"))
    parser.add_argument("--policies", type=Path, required=True, help="folder with policies NAME-SEED/policy")
    parser.add_argument("--family", default="budget-matched")
    parser.add_argument("--methods", type=method_names, default="vidcom2,random", help="beside the family")
    parser.add_argument("--ratios", type=ratios, default="0.4,0.25,0.1,0.05")
    parser.add_argument("--lengths", type=integers, default="1,2,4,8,16", help="times 16 frames")
    parser.add_argument("--strided", type=at_least(2), default=4, help="length at which frame rates are compared")
    parser.add_argument("--clips", type=at_least(2), default=24)
    parser.add_argument("--questions", type=at_least(1), default=8)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--threads", type=at_least(1), help="of torch")
    parser.add_argument("--output", type=Path, default=RESULTS / "context_rot.json")
    args = parser.parse_args()
    if args.strided not in args.lengths:
        parser.error(f"--strided must be one of --lengths {','.join(map(str, args.lengths))}, got {args.strided}")
    if args.threads:
        torch.set_num_threads(args.threads)
    named: dict[str, list[Candidate]] = {}
    for candidate in candidates(args.methods, args.policies):
        if candidate.policy is None or candidate.name == args.family:
            named.setdefault(candidate.name, []).append(candidate)
    if args.family not in named:
        parser.error(f"--policies {args.policies}: no {args.family}-SEED/policy in it")
    reader, footage = open_reader(args.reader), record_of(args.reader)["footage"]
    started, rows = time.monotonic(), []
    studies = [("length", length, {"num_frames": length * NUM_FRAMES, "clutter": 2}) for length in args.lengths]
    studies += [("clutter", clutter, {"clutter": clutter}) for clutter in CLUTTER]
    for study, value, options in tqdm(studies, desc="context", unit="point"):
        source = CompositeSource(args.split, args.clips, footage, **options)  # type: ignore[arg-type]
        clips = footage_clips(reader.engine.encoder, source, args.questions)
        rows += curve(reader, clips, named, args.ratios, study=study, value=value)
        if (study, value) == ("length", args.strided):
            plain = reader.ask(clips, everything, 1)
            for stride in STRIDES:
                run = reader.ask(clips, partial(every, stride), 1)
                about = {"study": "tokens", "value": value, "retention_ratio": 1 / stride}
                rows.append(row(clips, "fewer frames", [run], plain["right"], **about))
            rows += [
                {**found, "study": "tokens"}
                for found in rows
                if found["study"] == "length" and found["value"] == value and found["method"] != "vanilla"
            ]
    facts = {"clips": args.clips, "split": args.split, "family": args.family, "frames": NUM_FRAMES}
    publish("context_rot", args.output, rows, seconds=round(time.monotonic() - started, 1), **facts)


if __name__ == "__main__":
    main()
