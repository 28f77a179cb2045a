"""Prefill latency: one part per preset, a sentence in place of what no GPU has run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Sample
from benchmarks.prefill.flops import TextShape, flop_bound
from benchmarks.prefill.preset import PAPER_RATIOS, PRESETS, load_preset
from benchmarks.report import NOT_MEASURED, Block, Document, Lines
from benchmarks.report.plot import Panel, Series, png

HEADER = [
    "engine",
    "",
    "visual / total tokens",
    "compressor ms",
    "LLM forward ms",
    "total ms",
    "vs vanilla",
    "FLOP bound",
]
# In this order; results of other models follow by name.
GPU_PRESETS = ("paper", "qwen3-vl-8b", "qwen3.5-9b", "llava-video-7b")
ORDER = ("tiny", "demo", *GPU_PRESETS)


def ran(document: Document) -> list[dict[str, Any]]:
    """The rows that were measured."""
    return [row for row in document["rows"] if "not_run" not in row]


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells under ``HEADER``; what was not measured is empty."""

    def sample(key: str) -> str:
        return "" if row.get(key) is None else str(Sample(tuple(row[key]["values"])))

    def factor(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.1f}x"

    tokens = "" if row.get("visual_tokens") is None else f"{row['visual_tokens']} / {row['total_tokens']}"
    compressor = "-" if row["row"] == "vanilla" else sample("compressor_ms")
    times = [compressor, sample("llm_forward_ms"), sample("total_ms")]
    return [row.get("engine", ""), row["row"], tokens, *times, factor("speedup"), factor("flop_bound")]


def rows(document: Document) -> tuple[list[str], Lines]:
    """Every row; columns without any value are left out."""
    lines = [cells(row) for row in ran(document)]
    shown = [column for column in range(len(HEADER)) if column == 1 or any(line[column] for line in lines)]
    return [HEADER[i] for i in shown], [[line[i] for i in shown] for line in lines]


def caption(document: Document) -> str:
    """Machine, model, dtype and repeats."""
    about, arguments = document.get("preset", {}), document.get("arguments", {})
    name = about.get("description") or f"{arguments.get('model', '')} model, {arguments.get('frames', '')} frames"
    dtype = about.get("dtype") or arguments.get("dtype", "")
    repeats = document.get("repeats") or arguments.get("repeats", "")
    caution = "" if document["environment"].get("gpu") else "; milliseconds are of this machine alone"
    return f"{document['environment']['machine']}; {name}, {dtype}, {repeats} repeats{caution}"


def left_out(document: Document) -> str:
    """What did not run, and why."""
    skipped = [row for row in document["rows"] if "not_run" in row]
    reasons = sorted({f"{row['engine']}, {row['row'].rsplit(' ', 1)[0]}: {row['not_run']}" for row in skipped})
    return "\n\n".join(f"Not run here: {reason}." for reason in reasons)


def picture(document: Document, digest: str) -> bytes:
    """Measured speed-up of every row beside its FLOP bound."""
    shown = [row for row in document["rows"] if row.get("speedup") and row["row"] != "vanilla"]
    labels = [f"{row['row']}\n{row.get('engine', '')}".strip() for row in shown]
    speedups = [row["speedup"] for row in shown]
    series = [
        Series("measured", speedups, texts=[f"{value:.1f}" for value in speedups]),
        Series("FLOP bound", [row.get("flop_bound") or 0.0 for row in shown], style={"color": "0.8"}),
    ]
    panel = Panel("prefill, times vanilla", series, labels, "bar")
    return png(document["environment"]["machine"], [panel], digest, (max(5.0, 0.9 * len(shown) + 1.5), 3.2))


def empty_part(name: str) -> str:
    """What a GPU has still to run: tokens and FLOP bounds follow from the shapes alone."""
    preset = load_preset(name)
    raw = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    shape, text = TextShape.from_config(raw), preset.text_tokens + preset.structure_tokens(raw)
    retained = [preset.retained_tokens(ratio) for ratio in PAPER_RATIOS]
    ratios = " / ".join(f"{100 * ratio:g}" for ratio in PAPER_RATIOS)
    tokens = " / ".join(f"{visual:,}" for visual in retained)
    bounds = " / ".join(f"{flop_bound(shape, preset.visual_tokens + text, kept + text):.1f}x" for kept in retained)
    return (
        f"No GPU has run this yet: {preset.description}, {preset.dtype}. At {ratios} % it keeps {tokens} visual "
        f"tokens, and the FLOP bounds are {bounds}."
    )


def whole(results: dict[str, Document], part: Callable[[Document, str], str]) -> str:
    """All presets in order."""
    by_name = {file.removeprefix("prefill_latency_").removesuffix(".json"): file for file in results}
    names = [name for name in ORDER if name in by_name or name in GPU_PRESETS]
    names += sorted(set(by_name) - set(ORDER))
    parts = [] if results else [NOT_MEASURED]
    parts += [part(results[by_name[name]], by_name[name]) if name in by_name else empty_part(name) for name in names]
    return "\n\n".join(parts)


BLOCKS = {
    "prefill": Block(
        pattern="prefill_latency_*.json",
        rows=rows,
        caption=caption,
        after=left_out,
        picture=picture,
        whole=whole,
    )
}
