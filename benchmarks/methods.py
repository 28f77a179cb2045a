"""Every method at every ratio on one synthetic video: time, achieved ratio, peak memory, kept tokens per frame.

    python benchmarks/methods.py                                  # small, under a minute
    python benchmarks/methods.py --paper-size --output benchmarks/results/methods_cpu.json

Each row is checked first (exactly K tokens, ascending, same again on a second run); a method that fails is not timed.
The timed runs go round robin over the rows. Times are of ``select_tokens``: scores, selection and the gathered or
merged rows. The tokens are random scenes, so times are real and the choice of tokens means nothing; ``score`` runs with
untrained weights of the real size, as do the other learned methods, and those that rank by attention with a random
saliency, whose own cost is not in the times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import Sample, Stopwatch, machine_name, rounds, table, write_results
from benchmarks.memory import PeakMemory
from benchmarks.tokens import scene_tokens
from score_vllm import RetentionPolicy, TokenSelection, VideoGrid, methods, num_retained_tokens, select_tokens
from score_vllm.methods.cacovid_weights import CacovidWeights
from score_vllm.methods.visionselector_weights import SelectorWeights

SIZES = {"small": (16, 192, 1024), "paper-size": (64, 665, 3584)}
GRIDS = {"small": (12, 16), "paper-size": (19, 35)}
SECOND_VARIANTS = {"fastvid": "llavaov", "flashvid": "llava"}
RATIOS = (0.4, 0.25, 0.1)


def rows_to_measure(names: list[str]) -> list[tuple[str, str | None]]:
    """Method and variant of every row; variants that differ only in defaults or only in reference mode are one."""
    rows: list[tuple[str, str | None]] = []
    for name in names:
        rows.append((name, None))
        if name in SECOND_VARIANTS:
            rows.append((name, SECOND_VARIANTS[name]))
    return rows


def fault(first: TokenSelection, second: TokenSelection, keep: int) -> str | None:
    """What is wrong with a method's result, or None."""
    if first.num_retained != keep:
        return f"kept {first.num_retained} tokens instead of {keep}"
    if not bool((first.indices[1:] > first.indices[:-1]).all()):
        return "indices do not ascend"
    if not bool(first.embeddings.isfinite().all()):
        return "rows are not finite"
    if not (torch.equal(first.indices, second.indices) and torch.equal(first.embeddings, second.embeddings)):
        return "a second run gave another result"
    return None


def check(x: torch.Tensor, ratio: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """One row of the table, without times; ``fault`` is set where the result is wrong."""
    total = x.shape[0] * x.shape[1]
    first = select_tokens(x, ratio, **arguments)  # also the warm-up: lazy initialisation is not the method's memory
    with PeakMemory() as memory:
        second = select_tokens(x, ratio, **arguments)
    kept = first.kept_per_frame()
    row: dict[str, Any] = {
        "method": arguments["method"],
        "variant": arguments["variant"],
        "retention_ratio": ratio,
        "achieved_ratio": first.num_retained / total,
        "peak_memory_mib": None if memory.peak is None else round(memory.peak / 2**20, 1),
        "kept_per_frame": {
            "min": int(kept.min()),
            "median": float(statistics.median(kept.tolist())),
            "max": int(kept.max()),
        },
        "fault": fault(first, second, num_retained_tokens(total, ratio)),
    }
    return row


def label(row: dict[str, Any]) -> str:
    """Method and variant."""
    return row["method"] + (f" {row['variant']}" if row["variant"] else "")


def timed(x: torch.Tensor, ratio: float, arguments: dict[str, Any], _: int) -> float:
    """Milliseconds of one selection."""
    with Stopwatch() as watch:
        select_tokens(x, ratio, **arguments)
    return watch.ms


HEADER = ("method", "ratio", "achieved", "ms", "peak MiB", "kept per frame, min / median / max")


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, under ``HEADER``."""
    start = [label(row), f"{row['retention_ratio']:.2f}", f"{row['achieved_ratio']:.4f}"]
    if row["fault"]:
        return [*start, f"WRONG: {row['fault']}", "", ""]
    memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
    kept = "{min} / {median:g} / {max}".format(**row["kept_per_frame"])
    return [*start, str(Sample(tuple(row["ms"]["values"]))), memory, kept]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    for name, (frames, per_frame, d) in SIZES.items():
        flag = f"--{name}"
        described = f"T={frames}, N={per_frame}, D={d}" + (" (default)" if name == "small" else "")
        size.add_argument(flag, dest="size", action="store_const", const=name, default="small", help=described)
    parser.add_argument("--methods", default="", help="comma-separated; default: all registered")
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)), help="comma-separated (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per row (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}")
    arguments.methods = [name for name in arguments.methods.split(",") if name] or methods.names()
    try:
        arguments.ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
        for name in arguments.methods:
            methods.get(name)
        for ratio in arguments.ratios:
            num_retained_tokens(1, ratio)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 where a method's result was wrong."""
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    frames, per_frame, d = SIZES[arguments.size]
    x = scene_tokens(frames, per_frame, d, getattr(torch, arguments.dtype), arguments.device)
    saliency = torch.rand(frames, per_frame, generator=torch.Generator().manual_seed(1)).to(arguments.device)
    policy = RetentionPolicy(d).to(arguments.device) if "score" in arguments.methods else None
    learned = {"visionselector": SelectorWeights.random(d), "cacovid": CacovidWeights.random(d, heads=28, kv_heads=4)}
    grid = VideoGrid(frames, *GRIDS[arguments.size])
    todo = [(name, variant, r) for name, variant in rows_to_measure(arguments.methods) for r in arguments.ratios]
    print(f"T={frames} N={per_frame} D={d} {arguments.dtype}, {machine_name()}, {torch.get_num_threads()} threads")
    rows, calls = [], {}
    for name, variant, ratio in tqdm(todo, desc="check", unit="row", file=sys.stderr):
        weights = learned[name].to(arguments.device) if name in learned else None
        keywords = {
            "method": name,
            "variant": variant,
            "policy": policy,
            "saliency": saliency,
            "weights": weights,
            "grid": grid,
        }
        rows.append(check(x, ratio, keywords))
        if rows[-1]["fault"] is None:
            calls[str((name, variant, ratio))] = partial(timed, x, ratio, keywords)
    times = rounds(calls, arguments.repeats, warm_up=0, label="time") if calls else {}
    for row in rows:
        if row["fault"] is None:
            key = str((row["method"], row["variant"], row["retention_ratio"]))
            row["ms"] = Sample(tuple(times[key])).to_json()
    print(table(HEADER, [cells(row) for row in rows]))
    if arguments.output:
        video = {"T": frames, "N": per_frame, "D": d, "dtype": arguments.dtype, "content": "synthetic scenes"}
        write_results(arguments.output, rows, benchmark="methods", video=video, repeats=arguments.repeats)
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
