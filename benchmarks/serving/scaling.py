"""Cost against video length, vanilla and compressed: time, memory, and the longest video that fits.

    python -m benchmarks.serving.scaling             # 8 to 512 frames, within 10 minutes on two quiet cores
    python -m benchmarks.serving.scaling --quick
    python -m benchmarks.serving.scaling --model Qwen/Qwen2.5-VL-7B-Instruct --policy DIR --dtype bfloat16 \\
        --lengths 32,64,128,256,512,1024,2048 --fit-tokens 32768

Two engines in this process, plain vLLM and SCORE, take turns: each length is a request that goes from decoded frames
to the first token. Time is split into the language model, selection, and the rest (preprocessing and the vision tower,
the same work in both). Memory is the peak of the request above the engine at rest: resident memory on a CPU, allocated
memory on a GPU (where weights and KV cache are set aside at the start and so are no part of the difference).

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.clips import ClipShape, draw_frames
from benchmarks.harness import Sample, Stopwatch, at_least, default_output, integers, machine_name, ratios
from benchmarks.memory import PeakMemory
from benchmarks.report import publish
from benchmarks.serving.client import Counts
from benchmarks.serving.setup import QUESTION, model_parser, resolve
from score_vllm.config import ServingConfig

PROMPT = f"<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{QUESTION}<|im_end|>\n"


def ask(engine: Any, shape: ClipShape, seed: int, ratio: float | None = None, tokens: int = 1) -> dict[str, Any]:
    """One request. ``refused`` says in vLLM's words what stopped it; ``broken``: the engine cannot be used again."""
    from vllm.exceptions import VLLMClientError

    from benchmarks.engine import as_loaded

    video = as_loaded(draw_frames(shape.frames, shape.height, shape.width, seed))
    try:
        with PeakMemory() as memory, Stopwatch() as watch:
            output = engine.run(PROMPT, [video], ratio, num_tokens=tokens)
    except (VLLMClientError, ValueError) as error:
        return {"refused": " ".join(str(error).split())[:300]}
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in said and "allocate memory" not in said:
            raise
        # vLLM has not given the request up: a second one would wait behind it.
        return {"refused": " ".join(str(error).split())[:300], "broken": True}
    return {
        "total_ms": watch.ms,
        "llm_ms": engine.ms["forward"],
        "compressor_ms": engine.ms["compressor"],
        "peak_bytes": memory.peak,
        "visual_tokens": engine.visual_tokens(output),
        "prompt_tokens": len(output.prompt_token_ids),
        "answer": list(output.outputs[0].token_ids),
    }


def check(engines: dict[str, Any], shape: ClipShape) -> tuple[int, int]:
    """Ratio 1 against vanilla; ``(visual tokens per pair of frames, text tokens)``.

    Raises:
        SystemExit: they differ, or one of them refuses the video.
    """
    plain = ask(engines["vanilla"], shape, 10**6, tokens=8)
    whole = ask(engines["score"], shape, 10**6, 1.0, tokens=8)
    for name, result in (("vanilla", plain), ("SCORE", whole)):
        if "refused" in result:
            sys.exit(f"{name} refuses even {shape}: {result['refused']}")
    if plain["answer"] != whole["answer"] or plain["prompt_tokens"] != whole["prompt_tokens"]:
        sys.exit("correctness check failed: SCORE at ratio 1 and plain vLLM give different tokens; nothing was timed")
    print("correctness: tokens equal plain vLLM at ratio 1; every prompt is counted")
    return plain["visual_tokens"] * 2 // shape.frames, plain["prompt_tokens"] - plain["visual_tokens"]


def checked(result: dict[str, Any], counts: Counts, ratio: float | None) -> dict[str, Any]:
    """The result, which must have exactly the tokens that it should have where it was not refused."""
    if "refused" not in result and result["prompt_tokens"] != counts.prompt(ratio):
        sys.exit(f"count check failed: {result['prompt_tokens']} prompt tokens instead of {counts.prompt(ratio)}")
    return result


def summarise(name: str, frames: int, ratio: float | None, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the results: medians over repeats, and the highest memory."""
    if refused := next((result["refused"] for result in results if "refused" in result), None):
        return {"row": name, "frames": frames, "refused": refused}
    row: dict[str, Any] = {"row": name, "frames": frames, "retention_ratio": ratio}
    row |= {key: results[0][key] for key in ("visual_tokens", "prompt_tokens")}
    for key in ("total_ms", "llm_ms", "compressor_ms"):
        row[key] = Sample(tuple(result[key] for result in results)).to_json()
    return row | {"peak_bytes_above_rest": max(result["peak_bytes"] or 0 for result in results)}


def curves(
    engines: dict[str, Any], size: Callable[[int], ClipShape], count: Callable[[int], Counts], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per engine and length: engines in turn, lengths ascending."""
    kinds = {"vanilla": None, "score": args.ratio[0]}
    for name, ratio in kinds.items():
        ask(engines[name], size(args.lengths[0]), 10**7, ratio)  # warms it
    rows = []
    for frames in tqdm(args.lengths, desc="lengths", unit="length"):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for repeat in range(args.repeats):
            for name, ratio in kinds.items():
                found[name].append(checked(ask(engines[name], size(frames), repeat, ratio), count(frames), ratio))
                if "broken" in found[name][-1]:
                    sys.exit(f"{name} ran out of memory at {frames} frames; choose shorter --lengths")
        rows += [summarise(name, frames, ratio, found[name]) for name, ratio in kinds.items()]
    return rows


def longest_that_fits(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Largest even number of frames for which ``fits`` holds, by doubling and then halving.

    Args:
        fits: True up to some length, False above.
        start: even, at least 4: tried first.
        limit: even: never above.

    Returns:
        In [0, limit]; 0 where not even ``start`` fits.
    """
    if start < 4 or start % 2 or limit % 2 or limit < start:
        raise ValueError(f"start must be even, >= 4 and <= limit (even), got start {start} and limit {limit}")
    if not fits(start):
        return 0
    low, high = start, start
    while low == high:
        if low == limit:
            return limit
        high = min(2 * low, limit)
        if fits(high):
            low = high
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_longest(
    name: str,
    make: Callable[[], Any],
    size: Callable[[int], ClipShape],
    count: Callable[[int], Counts],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The longest video that an engine answers, and what refuses the next longer one; a broken engine is replaced."""
    ratio = None if name == "vanilla" else args.ratio[0]
    refusals: dict[int, str] = {}
    engine = make()

    def fits(frames: int) -> bool:
        nonlocal engine
        result = checked(ask(engine, size(frames), frames, ratio), count(frames), ratio)
        progress.update()
        if "refused" in result:
            refusals[frames] = result["refused"]
        if "broken" in result:
            engine.close()
            engine = make()
        return "refused" not in result

    with tqdm(desc=f"longest that fits, {name}", unit="try") as progress:
        longest = longest_that_fits(fits, 8, args.fit_limit)
    engine.close()
    row = {"row": name, "retention_ratio": ratio, "context_tokens": args.fit_tokens, "longest_frames": longest}
    return row | {"at_limit": longest == args.fit_limit, "refusal": refusals.get(longest + 2)}


def parse_arguments() -> argparse.Namespace:
    """Command line, checked."""
    parser = model_parser(__doc__)
    add = parser.add_argument
    add("--ratio", type=ratios, default="0.1", help="one retention ratio (default %(default)s)")
    add("--lengths", type=integers, default="8,16,32,64,128,256,512", help="frames, even, with commas between")
    add("--height", type=at_least(28), default=224, help="of a frame (default %(default)s)")
    add("--width", type=at_least(28), default=224, help="of a frame (default %(default)s)")
    add("--repeats", type=at_least(1), default=3, help="per length (default %(default)s)")
    add("--fit-tokens", type=at_least(128), default=2048, help="context and KV cache of the search")
    add("--fit-limit", type=at_least(8), default=4096, help="most frames that the search tries, even")
    add("--engine-args", type=json.loads, default={}, help="further arguments of vLLM's LLM, JSON")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.height, args.width, args.repeats = [8, 16, 32], 112, 112, 1
        args.fit_tokens, args.fit_limit = 256, 512
    try:
        for frames in (*args.lengths, args.fit_limit):
            ClipShape(frames, args.height, args.width)
    except ValueError as error:
        parser.error(str(error))
    args.bench = resolve(parser, args)
    return args


def main() -> None:
    args = parse_arguments()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.kv_gib)
    from benchmarks.engine import Engine

    model = args.bench
    print(f"{machine_name()}; {model.description}, frames of {args.width}x{args.height}, {args.dtype}")
    size = partial(ClipShape, height=args.height, width=args.width)

    def make(name: str, length: int, **options: Any) -> Engine:
        serving = None if name == "vanilla" else ServingConfig(args.ratio[0], policy=model.policy)
        return Engine(model.path, serving, dtype=args.dtype, length=length, **options, **args.engine_args)

    engines = {name: make(name, size(args.lengths[-1]).visual_tokens + 256) for name in ("vanilla", "score")}
    per_pair, text = check(engines, size(args.lengths[0]))

    def count(frames: int) -> Counts:
        return Counts(frames // 2 * per_pair, text)

    rows = curves(engines, size, count, args)
    block = engines["vanilla"].llm.llm_engine.vllm_config.cache_config.block_size
    for engine in engines.values():
        engine.close()
    # Two blocks more than the context: vLLM keeps one for itself.
    blocks = -(-args.fit_tokens // block) + 2
    fit = []
    for name in engines:
        remake = partial(make, name, args.fit_tokens, num_gpu_blocks_override=blocks)
        fit.append(find_longest(name, remake, size, count, args))
    arguments = {key: str(value) for key, value in vars(args).items() if key not in ("output", "bench")}
    facts = {"model": model.description, "text_tokens": text, "visual_tokens_per_pair": per_pair, "fit": fit}
    output = args.output or default_output("scaling", args.model, args.quick)
    publish("scaling", Path(output), rows, arguments=arguments, **facts)


if __name__ == "__main__":
    main()
