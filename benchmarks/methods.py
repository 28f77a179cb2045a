"""Every method at every ratio on one synthetic video: time, achieved ratio, peak memory, kept tokens per frame.

    python benchmarks/methods.py                                  # small, under a minute
    python benchmarks/methods.py --paper-size --threads 2 --machine "2 cores of ..." --output out.json

Each row is checked first (exactly K tokens, ascending, same again on a second run); a method that fails has
no time printed. Times are of ``select_tokens``: scores, selection and the gathered or merged rows. The
tokens are random scenes, so times are real and the choice of tokens means nothing; ``score`` runs with
untrained weights of the real size, FastVID and HoliTom with a random saliency.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from score_vllm import RetentionPolicy, TokenSelection, __version__, methods, num_retained_tokens, select_tokens

SIZES = {"small": (16, 192, 1024), "paper-size": (64, 665, 3584)}
RATIOS = (0.4, 0.25, 0.1)
SCENE_FRAMES = 16


def synthetic_video(frames: int, per_frame: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, N, D] tokens of scenes of 16 frames: each place keeps its vector but for noise; an eighth moves.

    The tokens of a scene have a mean in common, as real ones do, so that its frames are alike as a whole.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(frames, per_frame, d, dtype=dtype)
    scene = shared = torch.empty(0)
    for t in range(frames):
        if t % SCENE_FRAMES == 0:
            shared = 0.5 * torch.randn(d, generator=generator)
            scene = shared + torch.randn(per_frame, d, generator=generator)
        frame = scene + 0.4 * torch.randn(per_frame, d, generator=generator)
        moving = torch.randperm(per_frame, generator=generator)[: per_frame // 8]
        frame[moving] = shared + torch.randn(len(moving), d, generator=generator)
        x[t] = frame.to(dtype)
    return x


def rows_to_measure(names: list[str]) -> list[tuple[str, str | None]]:
    """Method and variant of every row; variants that differ only in defaults or only in reference mode are one."""
    rows: list[tuple[str, str | None]] = []
    for name in names:
        rows.append((name, None))
        if name == "fastvid":
            rows.append((name, "llavaov"))
    return rows


class PeakMemory:
    """Highest memory above the start of a ``with`` block, in MiB; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib: float | None = None
        self._start = 0

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        try:
            # Give freed memory back first, or the run would reuse it unseen; then reset the high-water mark.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._start = self._status("VmRSS")
        except (OSError, AttributeError, StopIteration):
            self._start = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated() - self._start) / 2**20
        elif self._start >= 0:
            self.mib = (self._status("VmHWM") - self._start) / 2**10


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


def measure(x: torch.Tensor, ratio: float, arguments: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One row of the table; ``fault`` is set, and no time, where the result is wrong."""
    total = x.shape[0] * x.shape[1]

    def run() -> TokenSelection:
        selection = select_tokens(x, ratio, **arguments)
        if x.is_cuda:
            torch.cuda.synchronize()
        return selection

    first = run()  # also the warm-up: lazy initialisation is not the method's memory
    with PeakMemory(x.device) as memory:
        second = run()
    kept = first.kept_per_frame()
    row: dict[str, Any] = {
        "method": arguments["method"],
        "variant": arguments["variant"],
        "retention_ratio": ratio,
        "achieved_ratio": first.num_retained / total,
        "peak_memory_mib": None if memory.mib is None else round(memory.mib, 1),
        "kept_per_frame": {
            "min": int(kept.min()),
            "median": float(statistics.median(kept.tolist())),
            "max": int(kept.max()),
        },
        "fault": fault(first, second, num_retained_tokens(total, ratio)),
    }
    del first, second
    if row["fault"] is None:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        row["seconds"] = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return row


HEADER = (
    f"{'method':<18}{'ratio':>6}{'achieved':>10}{'median s':>10}{'min - max s':>17}{'peak MiB':>10}"
    f"{'kept per frame min/median/max':>32}"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table as text, under ``HEADER``."""
    name = row["method"] + (f" {row['variant']}" if row["variant"] else "")
    start = f"{name:<18}{row['retention_ratio']:>6.2f}{row['achieved_ratio']:>10.4f}"
    if row["fault"]:
        return f"{start}  WRONG: {row['fault']}"
    seconds = row["seconds"]
    spread = f"{seconds['min']:.3f} - {seconds['max']:.3f}"
    memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
    kept = "{min} / {median:g} / {max}".format(**row["kept_per_frame"])
    return f"{start}{seconds['median']:>10.3f}{spread:>17}{memory:>10}{kept:>32}"


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
    parser.add_argument("--machine", default="unnamed", help="what to call this machine in the results")
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
    x = synthetic_video(frames, per_frame, d, getattr(torch, arguments.dtype)).to(arguments.device)
    saliency = torch.rand(frames, per_frame, generator=torch.Generator().manual_seed(1)).to(arguments.device)
    policy = RetentionPolicy(d).to(arguments.device) if "score" in arguments.methods else None
    # Says how far to trust the times: about 0 before, about the number of threads after, on a quiet machine.
    load = [round(os.getloadavg()[0], 2)]
    todo = [(name, variant, r) for name, variant in rows_to_measure(arguments.methods) for r in arguments.ratios]
    print(f"T={frames} N={per_frame} D={d} {arguments.dtype}, {arguments.machine}, {torch.get_num_threads()} threads")
    print(HEADER, flush=True)
    rows = []
    for name, variant, ratio in (bar := tqdm(todo, unit="row", disable=None, file=sys.stderr)):
        bar.set_description(f"{name} {ratio:g}")
        keywords = {"method": name, "variant": variant, "policy": policy, "saliency": saliency}
        rows.append(measure(x, ratio, keywords, arguments.repeats))
        tqdm.write(line(rows[-1]), file=sys.stdout)
        sys.stdout.flush()
    load.append(round(os.getloadavg()[0], 2))
    print(f"load average over one minute: {load[0]} before, {load[1]} after")
    if arguments.output:
        report = {
            "benchmark": "methods",
            "machine": arguments.machine,
            "device": torch.cuda.get_device_name() if x.is_cuda else platform.machine(),
            "threads": torch.get_num_threads(),
            "load_average": {"before": load[0], "after": load[1]},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {
                "score_vllm": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "video": {"T": frames, "N": per_frame, "D": d, "dtype": arguments.dtype, "content": "synthetic scenes"},
            "repeats": arguments.repeats,
            "rows": rows,
        }
        part = arguments.output.with_name(arguments.output.name + ".part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, arguments.output)
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
