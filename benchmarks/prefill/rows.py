"""Rows of the prefill benchmark, from milliseconds to JSON; imports neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Sample
from benchmarks.prefill.flops import TextShape, flop_bound

METHOD_NAMES = {
    "score": "SCORE",
    "evs": "EVS",
    "vidcom2": "VidCom2",
    "fastvid": "FastVID",
    "holitom": "HoliTom",
    "dycoke": "DyCoke",
}


class CheckError(Exception):
    """A correctness check failed: nothing may be timed."""


# Of one prefill, in milliseconds: ``compressor``, ``llm_forward``, ``total``.
Times = dict[str, float]


def row_label(method: str | None, ratio: float | None, in_tree: bool = False) -> str:
    """``vanilla``, ``SCORE 40%``, ``in-tree EVS 10%`` (vLLM's own)."""
    if method is None or ratio is None:
        return "vanilla"
    return f"{'in-tree ' if in_tree else ''}{METHOD_NAMES.get(method, method)} {100 * ratio:g}%"


def make_row(
    engine: str,
    key: tuple[str | None, float | None],
    tokens: tuple[int, int],
    times: Sequence[Times],
    vanilla: Sequence[Times],
    shape: TextShape,
    whole: int,
    *,
    in_tree: bool = False,
) -> dict[str, Any]:
    """One row of the results.

    Args:
        engine: ``vllm`` or ``transformers``.
        key: method and ratio; both None for vanilla.
        tokens: ``(visual, all)``.
        times: per repeat.
        vanilla: of the same rounds.
        shape: of the language model.
        whole: length of the uncompressed prompt.
        in_tree: True for vLLM's own pruning.
    """
    method, ratio = key
    samples = {name: Sample(tuple(time[name] for time in times)) for name in ("compressor", "llm_forward", "total")}
    pairs = zip(vanilla, times, strict=True)
    return {
        "engine": engine,
        "row": row_label(method, ratio, in_tree),
        "method": method,
        "in_tree": in_tree,
        "retention_ratio": ratio,
        "visual_tokens": tokens[0],
        "total_tokens": tokens[1],
        "compressor_ms": None if method is None else samples["compressor"].to_json(),
        "llm_forward_ms": samples["llm_forward"].to_json(),
        "total_ms": samples["total"].to_json(),
        "speedup": Sample(tuple(v["total"] for v in vanilla)).median / samples["total"].median,
        "speedup_per_round": Sample(tuple(v["total"] / t["total"] for v, t in pairs)).to_json(),
        "flop_bound": flop_bound(shape, whole, tokens[1]),
    }


def missing_row(engine: str, method: str, ratio: float, reason: str) -> dict[str, Any]:
    """A row of vLLM's own pruning that did not run, and why."""
    keys = ("visual_tokens", "total_tokens", "compressor_ms", "llm_forward_ms", "total_ms", "speedup", "flop_bound")
    row = {"engine": engine, "row": row_label(method, ratio, True), "method": method, "in_tree": True}
    return {**row, "retention_ratio": ratio, **dict.fromkeys(keys), "not_run": reason}
