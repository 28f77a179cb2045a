"""The compressor's kernels against their floor and against what else one could run, in one process.

    python benchmarks/kernels.py                 # on a GPU: all sizes; without one: the CPU path at small sizes
    python benchmarks/kernels.py --tune          # on a GPU: times the neighbours of the committed configurations

At each size the results are first checked: scores against fp64 (at most twice plain torch's error), indices against
a stable sort, the buffer against a gather. Nothing is timed where a check fails. Repetitions go round robin over the
implementations and over several copies of the tokens, so that neither a slow spell nor a warm cache favours one.
Weights and tokens are random: the time does not depend on their values.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import (
    RESULTS,
    Sample,
    Stopwatch,
    at_least,
    machine_name,
    rounds,
    script_parser,
    table,
    write_results,
)
from benchmarks.memory import PeakMemory
from score_vllm.budget import num_retained_tokens
from score_vllm.kernels import configs, ops, reference
from score_vllm.layout import grid_layout
from score_vllm.select import select_retained
from score_vllm.types import VideoGrid

# T, h, w. The paper's 42,566 tokens are twice a prime, so no real grid has them; this one has 42,560.
GPU_GRIDS = {"8K": (16, 16, 32), "paper": (64, 19, 35), "170K": (256, 19, 35), "680K": (1024, 19, 35)}
CPU_GRIDS = {"2K": (8, 16, 16), "8K": (16, 16, 32), "paper": (64, 19, 35)}
# Plain torch in fp16 takes seconds a call already at 8K on a CPU without the instructions.
CPU_DTYPES = {
    "2K": (torch.bfloat16, torch.float16, torch.float32),
    "8K": (torch.bfloat16, torch.float32),
    "paper": (torch.bfloat16,),
}
RETENTION = 0.1


Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def naive(x: torch.Tensor, plain: Parameters, k: int, channels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The compressor as one would write it in torch, tokens and parameters in the same dtype."""
    w_in, b_in, w_out, b_out = plain
    hidden = F.gelu(F.linear(torch.cat([x, x - reference.previous(x)], -1), w_in, b_in))
    scores = (hidden @ w_out + b_out).float().flatten()
    indices = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
    return torch.cat([x.flatten(0, 1)[indices], channels[indices]], -1), indices, scores


def exact_scores(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """[T * N] float64 by the paper's equations, a frame at a time."""
    w_in, b_in, w_out, b_out = (p.double() for p in parameters)
    out = []
    for t in range(x.shape[0]):
        frame = x[t].double()
        state = torch.cat([frame, frame - x[t - 1].double() if t else frame], -1)
        out.append(F.gelu(F.linear(state, w_in, b_in)) @ w_out + b_out)
    return torch.cat(out)


class Case:
    """One size: tokens (several copies), weights, positions, and its own correctness check."""

    def __init__(self, grid: tuple[int, int, int], d: int, h: int, dtype: torch.dtype, device: torch.device) -> None:
        t, rows, columns = grid
        copies = 3 if device.type == "cuda" and t * rows * columns < 100_000 else 1
        self.tokens = [torch.randn(t, rows * columns, d, dtype=dtype, device=device) for _ in range(copies)]
        self.turn = 0
        w_in = torch.randn(h, 2 * d, device=device) / (2 * d) ** 0.5
        vectors = torch.randn(h, device=device) / 4, torch.randn(h, device=device) / h**0.5
        self.raw: Parameters = (w_in, *vectors, torch.zeros(1, device=device))
        self.plain: Parameters = tuple(p.to(dtype) for p in self.raw)  # type: ignore[assignment]
        self.weights = ops.pack_weights(*self.raw, dtype)
        layout = grid_layout(VideoGrid(t, rows, columns), 2.0)
        self.positions = ops.PositionTable.from_layout(layout).on(torch.device(device))
        self.total = t * rows * columns
        self.k = num_retained_tokens(self.total, RETENTION)
        every = torch.arange(self.total, device=device)
        self.channels = reference.kept_channels(every, self.positions, dtype)

    def x(self) -> torch.Tensor:
        """The next copy of the tokens."""
        self.turn += 1
        return self.tokens[self.turn % len(self.tokens)]

    def check(self, backend: str) -> dict[str, float]:
        """Errors of ours and of plain torch against fp64.

        Raises:
            SystemExit: a result is wrong.
        """
        x = self.tokens[0]
        out = ops.select_rows(x, self.weights, self.k, self.positions)
        want = exact_scores(x, self.raw)
        ours = float((out.scores.double() - want).abs().max())
        plain = float((naive(x, self.plain, self.k, self.channels)[2].double() - want).abs().max())
        if ops.last_backend("select_rows") != backend:
            raise SystemExit(f"{ops.last_backend('compress')} ran where {backend} should have")
        if not ours <= 2 * plain or bool(out.has_nan):
            raise SystemExit(f"scores are wrong: {ours:.2e} from fp64, plain torch {plain:.2e}")
        if not torch.equal(out.indices, reference.topk(out.scores, self.k)[0]):
            raise SystemExit("indices differ from a stable sort of the scores")
        if not torch.equal(out.buffer, reference.gather(x, out.indices, self.positions)):
            raise SystemExit("the buffer differs from a gather of the kept rows")
        return {"error": ours, "plain_torch_error": plain}

    def facts(self, backend: str) -> dict[str, Any]:
        """What every row of this size says."""
        x, checked = self.tokens[0], self.check(backend)
        dtype = str(x.dtype).removeprefix("torch.")
        return {"tokens": self.total, "kept": self.k, "x_bytes": x.nbytes, "dtype": dtype, **checked}


def time_gpu(call: Callable[[], object]) -> float:
    """Milliseconds of one call between two events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def time_cpu(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    with Stopwatch() as watch:
        call()
    return watch.ms


def measure(
    calls: dict[str, Callable[[], object]], repeats: int, timer: Callable[[Callable[[], object]], float], label: str
) -> dict[str, Sample]:
    """Round robin over the calls, after two untimed rounds."""
    timed = {name: lambda _, call=call: timer(call) for name, call in calls.items()}
    return {name: Sample(tuple(v)) for name, v in rounds(timed, repeats, warm_up=2, label=label).items()}


def peak(call: Callable[[], object]) -> int | None:
    """Most memory of a call beyond that before it, in bytes."""
    with PeakMemory() as memory:
        call()
    return memory.peak


def row(name: str, sample: Sample, case: Case, facts: dict[str, Any], peak: int | None, size: str) -> dict[str, Any]:
    """One line of the results: rates are of the useful work, whatever an implementation does beside it."""
    gemm_flop = 2 * case.total * case.weights.w_in.numel()
    seconds = sample.median / 1e3
    scored = name.startswith(("ours", "torch", "compiled", "GEMM", "reference"))
    rates = {"tflops": gemm_flop / seconds / 1e12, "x_gb_per_s": facts["x_bytes"] / seconds / 1e9} if scored else {}
    return {"size": size, "implementation": name, "ms": sample.to_json(), "peak_bytes": peak, **rates, **facts}


def gpu_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in args.sizes or GPU_GRIDS:
        rows += gpu_size(size, args)
        torch.cuda.empty_cache()
    return rows


def gpu_size(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from score_vllm.kernels import score as score_kernel

    device = torch.device("cuda")
    case = Case(GPU_GRIDS[size], args.hidden, args.width, torch.bfloat16, device)
    facts = case.facts("triton")
    compiled = torch.compile(naive, dynamic=False)
    concatenated = torch.randn(case.total, 2 * args.hidden, dtype=torch.bfloat16, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = ops.select_rows(case.tokens[0], case.weights, case.k, case.positions)
    graph.replay()
    scores, some = held.scores.clone(), held.indices.clone()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.select_rows(case.x(), case.weights, case.k, case.positions),
        "ours, CUDA graph": graph.replay,
        "ours: score": lambda: score_kernel.score_partials(case.x(), case.weights),
        "top-k alone": lambda: ops.topk(scores, case.k),
        "gather alone": lambda: ops.gather(case.x(), some, case.positions),
        "GEMM (cuBLAS)": lambda: concatenated @ case.weights.w_in.T,
        "torch": lambda: naive(case.x(), case.plain, case.k, case.channels),
        "compiled torch": lambda: compiled(case.x(), case.plain, case.k, case.channels),
        "EVS selection": lambda: select_retained(case.x(), case.k, "evs"),
        "VidCom2 selection": lambda: select_retained(case.x(), case.k, "vidcom2"),
    }
    samples = measure(calls, args.repeats, time_gpu, size)
    return [row(name, sample, case, facts, peak(calls[name]), size) for name, sample in samples.items()]


def cpu_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows, device = [], torch.device("cpu")
    for size in args.sizes or CPU_GRIDS:
        for dtype in CPU_DTYPES[size]:
            case = Case(CPU_GRIDS[size], args.hidden, args.width, dtype, device)
            facts = case.facts("torch")
            w = case.weights
            calls: dict[str, Callable[[], object]] = {
                "ours": functools.partial(ops.select_rows, case.tokens[0], w, case.k, case.positions),
                "ours: score": functools.partial(ops.score, case.tokens[0], *case.raw),
                "reference: score": functools.partial(reference.score, case.tokens[0], *case.raw),
                "torch": functools.partial(naive, case.tokens[0], case.plain, case.k, case.channels),
            }
            with torch.no_grad():
                samples = measure(calls, args.repeats, time_cpu, f"{size} {facts['dtype']}")
                for name, sample in samples.items():
                    rows.append(row(name, sample, case, facts, peak(calls[name]), size))
    return rows


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the committed configuration of the score kernel against its neighbours, at one size."""
    from triton.runtime.errors import OutOfResources

    from score_vllm.kernels import score as score_kernel

    size = (args.sizes or ["paper"])[0]
    case = Case(GPU_GRIDS[size], args.hidden, args.width, torch.bfloat16, torch.device("cuda"))
    facts = case.facts("triton")
    major, minor = torch.cuda.get_device_capability()
    base = configs.score_config(configs.architecture((major, minor)), 2, case.weights.width)
    tried = {base}
    for block_h in (64, 128, 256):
        for block_k, stages in ((32, 3), (32, 4), (32, 5), (64, 2), (64, 3), (128, 2)):
            for warps in (4, 8):
                fits = case.weights.width % block_h == 0
                variant = replace(base, block_h=block_h, block_k=block_k, num_stages=stages, num_warps=warps)
                tried |= {variant, replace(variant, block_m=64)} if fits else set()
    calls: dict[str, Callable[[], object]] = {}
    for config in tqdm(sorted(tried, key=str), desc="compile"):
        call = functools.partial(score_kernel.score_partials, case.tokens[0], case.weights, config)
        try:
            scores = call().sum(0)
        except OutOfResources:
            continue
        if float((scores - ops.select_rows(case.tokens[0], case.weights, 1).scores).abs().max()) > 1e-4:
            raise SystemExit(f"{config} gives other scores")
        calls[str(config) + (" (committed)" if config == base else "")] = call
    samples = measure(calls, args.repeats, time_gpu, "tune")
    ranked = sorted(samples.items(), key=lambda item: item[1].median)
    return [row(f"ours: score, {name}", sample, case, facts, None, size) for name, sample in ranked]


def summary(r: dict[str, Any]) -> list[str]:
    """A row's cells in the printed table."""
    rates = [f"{r['tflops']:.2f}", f"{r['x_gb_per_s']:.1f}"] if "tflops" in r else ["", ""]
    peak = "" if r["peak_bytes"] is None else f"{100 * r['peak_bytes'] / r['x_bytes']:.1f}"
    took = f"{r['ms']['median']:.3f} ± {r['ms']['spread']:.3f}"
    return [r["size"], r["dtype"], r["implementation"], took, *rates, peak]


def main() -> None:
    parser = script_parser(__doc__)
    on_gpu = torch.cuda.is_available()
    grids = GPU_GRIDS if on_gpu else CPU_GRIDS
    parser.add_argument("--sizes", nargs="+", choices=list(grids), help="default: all")
    parser.add_argument("--hidden", type=int, default=3584, help="D (default: %(default)s, Qwen2.5-VL-7B)")
    parser.add_argument("--width", type=int, default=512, help="H (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least(1), default=30 if on_gpu else 7)
    parser.add_argument("--tune", action="store_true", help="compare tile shapes of the score kernel (GPU only)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/kernels_*.json)")
    args = parser.parse_args()
    if args.tune and not on_gpu:
        raise SystemExit("--tune needs a GPU: there is nothing to time here")
    if not on_gpu:
        print("No GPU here: only the CPU path is measured, at small sizes. Nothing about a GPU is estimated.")
    torch.manual_seed(int(time.time()))
    rows = tune(args) if args.tune else gpu_rows(args) if on_gpu else cpu_rows(args)
    name = "kernels_tune.json" if args.tune else "kernels_gpu.json" if on_gpu else "kernels_cpu.json"
    out = args.out or RESULTS / name
    arguments = {"hidden": args.hidden, "width": args.width, "repeats": args.repeats, "retention": RETENTION}
    write_results(out, rows, arguments=arguments, threads=torch.get_num_threads(), gpu=on_gpu)
    print(machine_name())
    cells = [summary(r) for r in rows]
    print(table(["size", "dtype", "implementation", "ms", "TFLOP/s", "X GB/s", "peak, % of X"], cells))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
