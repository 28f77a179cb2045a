"""Cost against video length, vanilla and compressed: time, memory, and the longest video that fits.

    python benchmarks/scaling.py                # 8 to 512 frames, meant to stay within 10 minutes on two quiet cores
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --model Qwen/Qwen2.5-VL-7B-Instruct --policy DIR --dtype bfloat16 \\
        --frames 32,64,128,256,512,1024,2048 --fit-tokens 32768

Two engines in processes of their own, plain vLLM and SCORE, take turns: each length is a request that goes from decoded
frames to the first token. Time is split into the language model, selection, and the rest (preprocessing and the vision
tower, the same work in both). Memory is the peak of the request above the engine at rest: resident memory on a CPU,
allocated memory on a GPU (where weights and KV cache are set aside at the start and so are no part of the difference).

"Longest video that fits": both engines get a context of ``--fit-tokens`` tokens and a KV cache for one such request;
the largest even number of frames that they answer is searched by doubling and halving. What stops them is reported in
vLLM's words.

Before anything is timed: tokens at ratio 1 must equal vanilla's. In every run, prompts must have exactly their tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent))
from bench_model import BenchModel, add_arguments, resolve_model
from clips import ClipShape
from engine_process import Worker, workers
from harness import Sample, default_output, machine_name, table, write_results
from longest_video import Prober, longest_that_fits
from report_blocks import save_picture
from report_blocks.scaling import picture

NAMES = ("vanilla", "score")


def check(engines: dict[str, Worker], frames: int, args: argparse.Namespace) -> tuple[int, int]:
    """Ratio 1 against vanilla; ``(visual tokens per pair of frames, text tokens)``."""
    plain = engines["vanilla"].ask(frames=frames, seed=10**6, tokens=8)
    whole = engines["score"].ask(frames=frames, seed=10**6, tokens=8, ratio=1.0)
    for name, result in (("vanilla", plain), ("SCORE", whole)):
        if "refused" in result:
            sys.exit(f"{name} refuses even {frames} frames: {result['refused']}")
    if plain["answer"] != whole["answer"] or plain["prompt_tokens"] != whole["prompt_tokens"]:
        sys.exit("correctness check failed: SCORE at ratio 1 and plain vLLM give different tokens; nothing was timed")
    return plain["visual_tokens"] * 2 // frames, plain["prompt_tokens"] - plain["visual_tokens"]


def check_count(result: dict[str, Any], frames: int, per_pair: int, ratio: float | None) -> None:
    """Exactly the tokens that it should have, or the end."""
    from score_vllm import num_retained_tokens

    original = frames // 2 * per_pair
    wanted = original if ratio is None else num_retained_tokens(original, ratio)
    if result["visual_tokens"] != wanted:
        sys.exit(f"count check failed: {frames} frames gave {result['visual_tokens']} visual tokens, not {wanted}")


def curves(engines: dict[str, Worker], per_pair: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per engine and length: medians over repeats, engines in turn, lengths ascending."""
    rows = []
    order = [(frames, repeat) for frames in args.frames for repeat in range(args.repeats)]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in NAMES:
        engines[name].ask(frames=args.frames[0], seed=10**7, tokens=1)  # warm
    rest = {name: engines[name].ask(frames=args.frames[0], seed=10**7 + 1, tokens=1)["rest_bytes"] for name in NAMES}
    for frames, repeat in tqdm(order, desc="lengths", unit="pair"):
        for name in NAMES:
            ratio = None if name == "vanilla" else args.ratio
            result = engines[name].ask(frames=frames, seed=repeat, tokens=1, ratio=ratio)
            if "refused" in result:
                tqdm.write(f"  {name}, {frames} frames: refused: {result['refused']}")
            else:
                check_count(result, frames, per_pair, ratio)
            found.setdefault((name, frames), []).append(result)
    for (name, frames), results in sorted(found.items(), key=lambda item: (item[0][1], item[0][0] != "vanilla")):
        if refused := next((result["refused"] for result in results if "refused" in result), None):
            rows.append({"row": name, "frames": frames, "refused": refused})
            continue
        row: dict[str, Any] = {
            "row": name,
            "frames": frames,
            "retention_ratio": args.ratio if name == "score" else None,
        }
        row |= {key: results[0][key] for key in ("visual_tokens", "prompt_tokens")}
        for key in ("total_ms", "llm_ms", "compressor_ms"):
            row[key] = Sample(tuple(result[key] for result in results)).to_json()
        row["peak_bytes_above_rest"] = max(result["peak_bytes"] for result in results) - rest[name]
        rows.append(row)
    return rows


def find_longest(
    setups: dict[str, dict[str, Any]], folder: Path, per_pair: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per engine: the longest video that fits, and what refuses the next longer one."""
    rows = []
    for name in NAMES:
        ratio = None if name == "vanilla" else args.ratio
        prober = Prober(name, setups[name], ratio, folder, partial(check_count, per_pair=per_pair, ratio=ratio))
        try:
            longest = longest_that_fits(prober.fits, 8, args.fit_limit)
        finally:
            prober.close()
        row = {"row": name, "retention_ratio": ratio, "context_tokens": args.fit_tokens, "longest_frames": longest}
        refusal = prober.refusals.get(longest + 2)
        rows.append({**row, "at_limit": longest == args.fit_limit, "refusal": refusal})
    return rows


def parse_arguments() -> argparse.Namespace:
    """Command line, checked; ``frames`` becomes an ascending list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--frames", default="8,16,32,64,128,256,512", help="comma-separated even numbers")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-gib", type=int, default=2, help="KV cache on a CPU")
    parser.add_argument("--fit-tokens", type=int, default=2048, help="context and KV cache of the search")
    parser.add_argument("--fit-limit", type=int, default=4096, help="most frames that the search tries")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of vLLM's LLM, JSON")
    parser.add_argument("--output", type=Path, default=None, help="results file; the picture goes beside it as .png")
    parser.add_argument("--quick", action="store_true", help="three short lengths and a small cache: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.height, args.width, args.repeats = "8,16,32", 112, 112, 1
        args.fit_tokens, args.fit_limit = 256, 512
    try:
        args.frames = sorted({int(text) for text in args.frames.split(",")})
        for frames in args.frames:
            ClipShape(frames, args.height, args.width)
    except ValueError as error:
        parser.error(f"--frames must be even numbers >= 4 with commas between: {error}")
    if not 0 < args.ratio < 1:
        parser.error(f"--ratio must be in (0, 1), got {args.ratio}")
    if args.repeats < 1 or args.fit_tokens < 128 or args.fit_limit < 8 or args.fit_limit % 2:
        parser.error("--repeats must be >= 1, --fit-tokens >= 128, --fit-limit even and >= 8")
    return args


def make_setup(
    model: BenchModel, name: str, args: argparse.Namespace, length: int, blocks: int | None
) -> dict[str, Any]:
    """What an engine process is told."""
    return {
        "model": model.path,
        "policy": None if name == "vanilla" else model.policy,
        "ratio": args.ratio,
        "dtype": args.dtype,
        "max_model_len": length,
        # vLLM's encoder cache has this many rows, and a video must fit into it.
        "batch_tokens": max(length, 2048),
        "kv_blocks": blocks,
        "kv_gib": args.kv_gib,
        "height": args.height,
        "width": args.width,
        "engine_args": args.engine_args,
    }


def main() -> None:
    args = parse_arguments()
    model = resolve_model(args.model, args.policy)
    folder = Path(tempfile.mkdtemp(prefix="score-scaling-"))
    longest = ClipShape(args.frames[-1], args.height, args.width)
    print(
        f"{machine_name()}; {model.description}, frames of {args.width}x{args.height}, {args.dtype}; logs in {folder}"
    )
    setups = {name: make_setup(model, name, args, longest.visual_tokens + 256, None) for name in NAMES}
    with workers(setups, folder) as engines:
        per_pair, text = check(engines, args.frames[0], args)
        print("correctness: tokens equal plain vLLM at ratio 1; every prompt is counted")
        block = engines["vanilla"].ready["block_size"]
        rows = curves(engines, per_pair, args)
    # Two blocks more than the context: vLLM keeps one for itself.
    blocks = -(-args.fit_tokens // block) + 2
    setups = {name: make_setup(model, name, args, args.fit_tokens, blocks) for name in NAMES}
    fit = find_longest(setups, folder, per_pair, args)

    print_rows(rows, fit)
    output = args.output or default_output("scaling", args.model, args.quick)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    facts = {"model": model.description, "text_tokens": text, "visual_tokens_per_pair": per_pair, "fit": fit}
    write_results(output, rows, benchmark="scaling", arguments=arguments, **facts)
    save_picture(output, picture)
    print(f"written: {os.path.relpath(output)} and {output.with_suffix('.png').name}")


def print_rows(rows: Sequence[dict[str, Any]], fit: Sequence[dict[str, Any]]) -> None:
    """The curves as a table, and the longest videos in words."""
    printed = []
    for row in rows:
        if "refused" in row:
            printed.append([str(row["frames"]), row["row"], "refused", "-", "-", "-", "-"])
            continue
        times = [f"{row[key]['median']:.0f}" for key in ("llm_ms", "compressor_ms", "total_ms")]
        memory = f"{row['peak_bytes_above_rest'] / 2**20:.0f}"
        printed.append([str(row["frames"]), row["row"], str(row["prompt_tokens"]), *times, memory])
    print(table(["frames", "", "prompt", "LLM ms", "compressor ms", "total ms", "MiB above rest"], printed))
    for row in fit:
        more = "; the search's limit" if row["at_limit"] else f"; the next is refused: {row['refusal']}"
        where = f"longest video in a context of {row['context_tokens']} tokens"
        print(f"{where}, {row['row']}: {row['longest_frames']} frames{more}")


if __name__ == "__main__":
    main()
