"""Rows of the prefill benchmark: from milliseconds to JSON, and from JSON to a table and a picture.

Nothing here imports torch or vLLM, so that the report can be written anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flops import TextShape, flop_bound
from harness import Sample
from report_blocks import png

HEADER = (
    "engine",
    "",
    "visual / total tokens",
    "compressor ms",
    "LLM forward ms",
    "total ms",
    "vs vanilla",
    "FLOP bound",
)
METHOD_NAMES = {
    "score": "SCORE",
    "evs": "EVS",
    "vidcom2": "VidCom2",
    "fastvid": "FastVID",
    "holitom": "HoliTom",
    "dycoke": "DyCoke",
}


def row_label(method: str | None, ratio: float | None, in_tree: bool = False) -> str:
    """``vanilla``, ``SCORE 40%``, ``in-tree EVS 10%`` (vLLM's own)."""
    if method is None or ratio is None:
        return "vanilla"
    name = METHOD_NAMES.get(method, method)
    return f"{'in-tree ' if in_tree else ''}{name} {100 * ratio:g}%"


def make_row(
    engine: str,
    method: str | None,
    ratio: float | None,
    tokens: tuple[int, int],
    times: Sequence[dict[str, float]],
    vanilla: Sequence[dict[str, float]],
    shape: TextShape,
    whole: int,
    *,
    in_tree: bool = False,
) -> dict[str, Any]:
    """One row of the results.

    Args:
        engine: ``vllm`` or ``transformers``.
        method: None for vanilla.
        ratio: None for vanilla.
        tokens: ``(visual, all)``.
        times: per repeat: ``compressor``, ``llm_forward``, ``total`` in milliseconds.
        vanilla: of the same rounds.
        shape: of the language model.
        whole: length of the uncompressed prompt.
        in_tree: True for vLLM's own pruning.
    """
    samples = {key: Sample(tuple(time[key] for time in times)) for key in ("compressor", "llm_forward", "total")}
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


def missing_row(engine: str, method: str, ratio: float, reason: str, *, in_tree: bool = True) -> dict[str, Any]:
    """A row that did not run, and why."""
    keys = ("visual_tokens", "total_tokens", "compressor_ms", "llm_forward_ms", "total_ms", "speedup", "flop_bound")
    row = {"engine": engine, "row": row_label(method, ratio, in_tree), "method": method, "in_tree": in_tree}
    return {**row, "retention_ratio": ratio, **dict.fromkeys(keys), "not_run": reason}


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells under ``HEADER``; what was not measured is empty."""

    def sample(key: str) -> str:
        value = row.get(key)
        return "" if value is None else str(Sample(tuple(value["values"])))

    def ratio(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.1f}x"

    tokens = "" if row.get("visual_tokens") is None else f"{row['visual_tokens']} / {row['total_tokens']}"
    compressor = "-" if row["row"] == "vanilla" else sample("compressor_ms")
    times = [compressor, sample("llm_forward_ms"), sample("total_ms")]
    return [row.get("engine", ""), row["row"], tokens, *times, ratio("speedup"), ratio("flop_bound")]


def picture(document: dict[str, Any], digest: str) -> bytes:
    """A small PNG: measured speed-up of every row beside its FLOP bound.

    Args:
        document: a results file of this benchmark.
        digest: of that file; stored in the PNG, by which the report sees that a picture is out of date.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if row.get("speedup") and row["row"] != "vanilla"]
    labels = [f"{row['row']}\n{row.get('engine', '')}".strip() for row in rows]
    figure = Figure(figsize=(max(5.0, 0.9 * len(rows) + 1.5), 3.2), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    bounds = [row.get("flop_bound") or 0.0 for row in rows]
    axes.bar([p - 0.2 for p in places], [row["speedup"] for row in rows], 0.4, label="measured")
    axes.bar([p + 0.2 for p in places], bounds, 0.4, label="FLOP bound", color="0.8")
    for place, row in zip(places, rows, strict=True):
        axes.text(place - 0.2, row["speedup"], f"{row['speedup']:.1f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.set_ylabel("prefill, times vanilla")
    axes.set_title(document["environment"]["machine"], fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure, digest)
