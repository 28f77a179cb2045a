"""The paper's table 3 on this machine: prefill with and without compression, side by side in one run.

    python benchmarks/prefill_latency.py                       # preset tiny, CPU, under two minutes
    python benchmarks/prefill_latency.py --preset paper        # Qwen2.5-VL-7B's shapes; needs a GPU
    python benchmarks/prefill_latency.py --methods all --engines transformers
    python benchmarks/prefill_latency.py --model path/to/Qwen2.5-VL-7B-Instruct --policy path/to/policy

Answers are compared before anything is timed (ratio 1 equals vanilla, exact counts, kept rows at their original
positions); where a check fails, nothing is timed. Repetitions go round robin over the rows, so that a slow spell of the
machine hits all of them. What each engine times: prefill/transformers_engine.py, prefill/vllm_engine.py. The FLOP
bound: prefill/flops.py. Milliseconds of a CPU are of that machine alone; the ratio is the result.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import (
    LOAD_AT_START,
    RESULTS,
    at_least,
    machine_name,
    ratios,
    rounds,
    script_parser,
    write_results,
)
from benchmarks.prefill.preset import (
    ENGINES,
    PAPER_RATIOS,
    SERVED_FAMILIES,
    Prepared,
    Preset,
    checkpoint_preset,
    load_preset,
    prepare,
)
from benchmarks.prefill.rows import CheckError, make_row, missing_row
from benchmarks.report import publish

# vLLM's own pruning of Qwen2.5-VL; its vidcom2 is for Qwen3-VL.
IN_TREE = ("evs",)
CHECK_SEED = 10**6
Rows = list[dict[str, Any]]


def on_gpu() -> bool:
    """True where torch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def run_transformers(prepared: Prepared, args: argparse.Namespace) -> Iterator[Rows]:
    """Check, then time, transformers' language model behind our compressor; yields the rows."""
    from benchmarks.prefill.transformers_engine import TransformersEngine

    engine = TransformersEngine(prepared, "cuda" if on_gpu() else "cpu", args.attention)
    engine.check(args.ratios, args.methods)
    print("transformers: kept rows and positions equal a gather of the whole prompt; ratio 1 gives vanilla's logits")
    keys = [(None, None), *[(name, ratio) for name in args.methods for ratio in args.ratios]]
    calls = {str(key): partial(lambda name, ratio, _: engine.run(ratio, name), *key) for key in keys}
    times = rounds(calls, args.repeats, label="transformers")
    whole, base, rows = prepared.total_tokens(None), times[str((None, None))], []
    for key in keys:
        tokens = prepared.preset.retained_tokens(key[1]), prepared.total_tokens(key[1])
        rows.append(make_row("transformers", key, tokens, times[str(key)], base, prepared.shape, whole))
    yield rows


def run_vllm(prepared: Prepared, args: argparse.Namespace) -> Iterator[Rows]:
    """Check, then time, plain vLLM and ours, then vLLM's own pruning where it runs; yields rows as they are done."""
    from benchmarks.prefill.vllm_engine import VllmEngine, check_compressed
    from score_vllm.config import ServingConfig

    first, *others = args.methods
    serving = ServingConfig(1.0, first, allowed_methods=tuple(others), policy=prepared.policy)
    vanilla = VllmEngine(prepared, gpu_memory=args.gpu_memory)
    score = VllmEngine(prepared, serving, gpu_memory=args.gpu_memory)
    visual, whole = check_compressed(vanilla, score, args.ratios, args.methods, CHECK_SEED)
    print("vllm: tokens equal plain vLLM's at ratio 1; every ratio keeps exactly the tokens it should")
    keys = [(None, None), *[(name, ratio) for name in args.methods for ratio in args.ratios]]
    engines = {key: vanilla if key[0] is None else score for key in keys}
    calls = {str(key): partial(time_vllm, engines[key], *key) for key in keys}
    times = rounds(calls, args.repeats, label="vllm")
    rows, base = [], times[str((None, None))]
    for key in keys:
        kept = visual if key[1] is None else prepared.preset.retained_tokens(key[1])
        tokens = kept, kept + whole - visual
        rows.append(make_row("vllm", key, tokens, times[str(key)], base, prepared.shape, whole))
    score.close()
    yield rows
    for method in IN_TREE:
        for ratio in args.ratios:
            yield [run_in_tree(prepared, args, vanilla, method, ratio, whole)]
    vanilla.close()


def time_vllm(engine: Any, name: str | None, ratio: float | None, number: int) -> dict[str, float]:
    """One prefill about a new video in every round: not the check's, and no seed below 0 (warm-up counts down)."""
    times: dict[str, float] = engine.timed(number % CHECK_SEED, ratio, name)
    return times


def run_in_tree(
    prepared: Prepared, args: argparse.Namespace, vanilla: Any, method: str, ratio: float, whole: int
) -> dict[str, Any]:
    """vLLM's own pruning at one rate, an engine of its own beside plain vLLM; says why where it does not run."""
    from benchmarks.prefill.vllm_engine import VllmEngine

    if args.in_tree == "no" or (args.in_tree == "auto" and not on_gpu()):
        return missing_row("vllm", method, ratio, "vLLM's CPU runner does not strip the columns that its pruning adds")
    try:
        engine = VllmEngine(prepared, pruning=(method, 1 - ratio), gpu_memory=args.gpu_memory)
        tokens = engine.counts(engine.ask(CHECK_SEED))
        calls = {name: partial(time_vllm, one, None, None) for name, one in (("vanilla", vanilla), ("pruned", engine))}
        times = rounds(calls, args.repeats, label=f"vLLM's {method} {ratio:g}")
        engine.close()
    except Exception as error:  # a fault of vLLM's own path must not cost the other rows
        return missing_row("vllm", method, ratio, f"{type(error).__name__}: {str(error)[:200]}")
    timed = times["pruned"], times["vanilla"], prepared.shape, whole
    return make_row("vllm", (method, ratio), tokens, *timed, in_tree=True)


RUNNERS = {"vllm": run_vllm, "transformers": run_transformers}


def usable_engines(preset: Preset, family: str, asked: str | None) -> list[str]:
    """The engines to run: those named, or the preset's that are installed.

    Raises:
        ValueError: a named engine is unknown, not installed, or does not serve the family.
    """
    chosen = []
    for name in [name.strip() for name in asked.split(",")] if asked else preset.engines:
        problem = None
        if name not in ENGINES:
            problem = f"engine must be one of {ENGINES}, got {name!r}"
        elif importlib.util.find_spec(name) is None:
            problem = f"engine {name} is not installed"
        elif name == "vllm" and family not in SERVED_FAMILIES:
            problem = f"the vLLM engine's prompts are for {SERVED_FAMILIES}, not {family}; use --engines transformers"
        if problem is None:
            chosen.append(name)
        elif asked:
            raise ValueError(problem)
        else:
            print(f"left out: {problem}")
    if not chosen:
        raise ValueError("no engine of the preset is installed")
    return chosen


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Preset]:
    """The command line, checked, and the preset it names."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--preset", default="tiny", help="a name in prefill/presets (default: %(default)s) or a .json file")
    add("--model", help="real weights: a directory or hub id, with the preset's prompt; or 'demo'")
    add("--policy", help="retention policy directory; default: seeded weights, which cost the same")
    add("--engines", help=f"of {', '.join(ENGINES)}, with commas between (default: the preset's)")
    add("--methods", default="score", help="names with commas between, or 'all' (default: %(default)s)")
    add("--ratios", type=ratios, default=[], help="further retention ratios beside 0.4,0.25,0.1")
    add("--repeats", type=at_least(1), help="timed runs per row (default: the preset's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the preset's")
    add("--attention", default="sdpa", help="transformers' attn_implementation (default: %(default)s)")
    add("--in-tree", choices=("auto", "yes", "no"), default="auto", help="vLLM's own pruning (GPU)")
    add("--gpu-memory", type=float, default=0.3, help="share of the GPU per vLLM engine")
    add("--output", type=Path, help="results file (default: benchmarks/results/prefill_latency_*.json)")
    args = parser.parse_args(argv)
    from score_vllm import methods

    try:
        preset = load_preset("demo" if args.model == "demo" else args.preset, repeats=args.repeats, dtype=args.dtype)
        if args.model and args.model != "demo":
            preset = checkpoint_preset(args.model, preset)
        args.ratios = sorted({*PAPER_RATIOS, *args.ratios}, reverse=True)
        named = [name.strip() for name in args.methods.split(",") if name.strip()]
        ours = ["score", *[name for name in methods.names() if methods.get(name).weights is None]]
        args.methods = ours if args.methods == "all" else [methods.get(name).name for name in dict.fromkeys(named)]
        if not args.methods or 1.0 in args.ratios:
            raise ValueError("--methods must name at least one method, and --ratios numbers below 1")
        if not 0 < args.gpu_memory < 1:
            raise ValueError(f"--gpu-memory must be in (0, 1), got {args.gpu_memory}")
    except ValueError as error:
        parser.error(str(error))
    args.repeats = preset.repeats
    return args, preset


def main(argv: list[str] | None = None) -> int:
    """Run; 1 where a check failed, and nothing of that engine was timed."""
    args, preset = parse_arguments(argv)
    if preset.needs_gpu and not on_gpu():
        print(f"preset {preset.name} needs a GPU and there is none; nothing was run", file=sys.stderr)
        return 2
    if LOAD_AT_START and LOAD_AT_START > 0.5:
        print(f"warning: the load average is {LOAD_AT_START:.1f}; times taken beside other work are no result")
    output = args.output or RESULTS / f"prefill_latency_{preset.name}.json"
    asked = {key: value for key, value in vars(args).items() if key != "output" and value is not None}
    arguments = {key: value if isinstance(value, list | int | float) else str(value) for key, value in asked.items()}
    about = {"name": preset.name, "description": preset.description, "dtype": preset.dtype, "weights": preset.weights}
    facts = {"benchmark": "prefill_latency", "preset": about, "arguments": arguments, "repeats": args.repeats}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            prepared = prepare(preset, Path(folder), args.policy)
            engines = usable_engines(preset, prepared.family, args.engines)
        except (OSError, ValueError) as error:
            print(f"cannot start: {error}", file=sys.stderr)
            return 2
        print(f"{machine_name()}; {preset.description}; {preset.dtype}, {args.repeats} repeats")
        for name in engines:
            try:
                # Written as rows are done, so that a later failure does not cost them.
                for done in RUNNERS[name](prepared, args):
                    rows += done
                    write_results(output, rows, **facts)
            except CheckError as error:
                print(f"correctness check failed: {error}; {name} was not timed", file=sys.stderr)
                return 1
            free_memory()
    publish("prefill", output, rows, **facts)
    return 0


def free_memory() -> None:
    """What an engine leaves behind, before the next one asks how much there is."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
