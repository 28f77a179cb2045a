"""``score-plan``: how many videos, and how long ones, a GPU holds at a retention ratio. Reads a configuration only."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from score_vllm.architectures import SHORT_NAMES
from score_vllm.budget import num_retained_tokens
from score_vllm.catalog import UsageError
from score_vllm.config import DEFAULT_MAX_FRAMES, cell_cache_bytes
from score_vllm.option_types import cell_cache_gib, retention_ratio
from score_vllm.plan import BLOCK_SIZE, GIB, RESERVE_GIB, UTILIZATION, ModelShape, Plan
from score_vllm.video.sampling import DEFAULT_CELL_TOKENS, DEFAULT_FPS


def _above_zero(kind: type) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"must be {'an integer' if kind is int else 'a number'} > 0, got {text!r}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Command line of ``score-plan``."""
    parser = argparse.ArgumentParser("score-plan", description=__doc__, allow_abbrev=False)
    add, count, number = parser.add_argument, _above_zero(int), _above_zero(float)
    add("--model", required=True, help=f"a directory with config.json, a hub id, or one of {', '.join(SHORT_NAMES)}")
    add("--gpu-gib", type=number, required=True, metavar="GIB", help="memory of one GPU")
    add("--gpus", type=count, default=1, metavar="N", help="--tensor-parallel-size (default: %(default)s)")
    add(
        "--frames",
        "--max-frames",
        type=count,
        default=DEFAULT_MAX_FRAMES,
        metavar="N",
        help="most frames read from a video (default: %(default)s)",
    )
    add(
        "--pixels",
        type=count,
        default=DEFAULT_CELL_TOKENS,
        metavar="TOKENS",
        help="visual tokens of a cell, as large as a frame gets (default: %(default)s, score-serve's own limit); "
        "of no account for LLaVA, whose frames have one size",
    )
    add(
        "--ratio",
        "--retention",
        type=retention_ratio,
        default=0.1,
        help="fraction of the tokens to keep (default: %(default)s)",
    )
    add("--fps", type=number, default=DEFAULT_FPS, help="frames per second read (default: %(default)s)")
    add("--text-tokens", type=count, default=512, metavar="N", help="question and answer (default: %(default)s)")
    add("--max-model-len", type=count, default=None, metavar="N", help="vLLM's (default: the model's own)")
    add("--utilization", type=number, default=UTILIZATION, help="--gpu-memory-utilization (default: %(default)s)")
    add("--cell-cache-gib", type=cell_cache_gib, default=None, metavar="GIB",
        help="score-serve's (default: 4 %% of the GPU's memory)")  # fmt: skip
    add("--weight-bytes", type=number, default=2.0, help="of a parameter; 1 for FP8 (default: %(default)s)")
    add("--block-size", type=count, default=BLOCK_SIZE, help="vLLM's (default: %(default)s)")
    add("--reserve-gib", type=number, default=RESERVE_GIB, metavar="GIB", help="for everything not counted: CUDA, "
        "graphs, the language model's activations (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    return parser


def report(plan: Plan, ratio: float) -> dict[str, Any]:
    """Everything that is printed, beside the same without compression."""
    grid, both = plan.layout.grid, (ratio, 1.0)
    kept = num_retained_tokens(grid.num_tokens, ratio)
    longest = [plan.longest(one) for one in both]
    return {
        "parameters": plan.shape.parameters,
        "video": {
            "frames": plan.frames, "seconds": plan.frames / plan.fps, "cells": grid.t,
            "tokens_per_cell": grid.tokens_per_frame, "original_tokens": grid.num_tokens, "retained_tokens": kept,
            "structure_tokens": plan.layout.structure_tokens,
        },
        "memory_gib": {name: size / GIB for name, size in plan.parts.items()}
        | {"kv_cache": plan.kv_tokens * plan.kv_bytes / GIB, "usable": plan.memory / GIB},
        "kv_cache": {"bytes_per_token": plan.kv_bytes, "blocks": plan.blocks, "tokens": plan.kv_tokens},
        "kv_tokens_saved_per_video": grid.num_tokens - kept,
        "kv_gib_saved_per_video": (grid.num_tokens - kept) * plan.kv_bytes / GIB,
        "prompt_tokens": {_name(one): plan.prompt_tokens(one) for one in both},
        "concurrent_videos": {_name(one): plan.concurrent(one) for one in both},
        "not_served_because": {_name(one): plan.limit(one) for one in both},
        "longest_video": {
            _name(one): {"frames": frames, "minutes": frames / plan.fps / 60, "limited_by": limit}
            for one, (frames, limit) in zip(both, longest, strict=True)
        },
    }  # fmt: skip


def _name(ratio: float) -> str:
    return f"{ratio:g}"


def table(plan: Plan, ratio: float) -> str:
    """The report for people."""
    made = report(plan, ratio)
    video, memory, kv = made["video"], made["memory_gib"], made["kv_cache"]
    lines = [
        f"video      {video['frames']} frames ({video['seconds']:g} s): {video['cells']} cells x "
        f"{video['tokens_per_cell']} = {video['original_tokens']:,} visual tokens, {video['retained_tokens']:,} kept, "
        f"{video['structure_tokens']:,} structure",
        f"memory     {memory['usable']:.1f} GiB of a GPU: "
        + ", ".join(f"{name} {memory[name]:.2f}" for name in plan.parts),
        f"KV cache   {memory['kv_cache']:.1f} GiB: {kv['tokens']:,} tokens in {kv['blocks']:,} blocks, "
        f"{kv['bytes_per_token'] / 1024:g} KiB a token on a GPU",
        f"saved      {made['kv_tokens_saved_per_video']:,} KV tokens a video, "
        f"{made['kv_gib_saved_per_video'] * plan.gpus:.2f} GiB",
        "",
        f"{'ratio':>8} {'prompt':>9} {'videos at once':>15} {'longest video':>27}  limited by",
    ]
    for one in dict.fromkeys((ratio, 1.0)):
        name = _name(one)
        most = made["longest_video"][name]
        length = f"{most['frames']:,} frames, {most['minutes']:.1f} min"
        at_once, why = made["concurrent_videos"][name], made["not_served_because"][name]
        lines.append(
            f"{name:>8} {made['prompt_tokens'][name]:>9,} {at_once:>15,} {length:>27}  {most['limited_by']}"
            + (f"; this video exceeds {why}" if why else "")
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Console entry point."""
    args = build_parser().parse_args(argv)
    try:
        shape = ModelShape.from_model(args.model)
    except UsageError as error:
        sys.exit(f"score-plan: error: {error}")
    memory = args.gpu_gib * GIB
    plan = Plan(
        shape=shape, frames=args.frames, tokens=args.pixels, memory=memory * args.utilization,
        cell_cache=cell_cache_bytes(args.cell_cache_gib, memory), fps=args.fps, gpus=args.gpus,
        text_tokens=args.text_tokens, max_model_len=args.max_model_len, weight_bytes=args.weight_bytes,
        block_size=args.block_size, reserve=args.reserve_gib * GIB,
    )  # fmt: skip
    print(json.dumps(report(plan, args.ratio), indent=2) if args.json else table(plan, args.ratio))


if __name__ == "__main__":
    main()
