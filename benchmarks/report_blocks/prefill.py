"""The prefill table: one part per preset, a sentence in place of what no GPU has run."""

from __future__ import annotations

import json
from typing import Any

from flops import TextShape, flop_bound
from harness import table
from prefill_presets import PRESETS, load_preset
from prefill_table import HEADER, cells, picture

from report_blocks import NOT_MEASURED, block, link

PAPER_RATIOS = (0.4, 0.25, 0.1)
# In this order; results of other models follow by name.
ORDER = ("tiny", "demo", "paper", "qwen3-vl-8b")
GPU_PRESETS = ("paper", "qwen3-vl-8b")


def part(document: dict[str, Any], file: str) -> str:
    """Table and caption of one results file."""
    rows = [row for row in document["rows"] if "not_run" not in row]
    about, machine = document.get("preset", {}), document["environment"]["machine"]
    arguments = document.get("arguments", {})
    name = about.get("description") or f"{arguments.get('model', '')} model, {arguments.get('frames', '')} frames"
    dtype = about.get("dtype") or arguments.get("dtype", "")
    repeats = document.get("repeats") or arguments.get("repeats", "")
    shown = [column for column in range(len(HEADER)) if column == 1 or any(cells(row)[column] for row in rows)]
    body = table([HEADER[i] for i in shown], [[cells(row)[i] for i in shown] for row in rows])
    caution = "" if document["environment"].get("gpu") else "; milliseconds are of this machine alone"
    caption = f"({machine}; {name}, {dtype}, {repeats} repeats{caution}; {link(file)}"
    if "schema" in document:
        caption += f", [picture](benchmarks/results/{file.removesuffix('.json')}.png)"
    skipped = [row for row in document["rows"] if "not_run" in row]
    left_out = sorted({f"{row['engine']}, {row['row'].rsplit(' ', 1)[0]}: {row['not_run']}" for row in skipped})
    return "\n".join([body, "", caption + ")", *[f"\nNot run here: {reason}." for reason in left_out]])


def empty_part(name: str) -> str:
    """What a GPU has still to run: tokens and FLOP bounds follow from the shapes alone."""
    preset = load_preset(name)
    raw = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    shape, text = TextShape.from_config(raw), preset.text_tokens + preset.structure_tokens(raw["model_type"])
    whole = preset.visual_tokens + text
    retained = [preset.retained_tokens(ratio) for ratio in PAPER_RATIOS]
    ratios = " / ".join(f"{100 * ratio:g}" for ratio in PAPER_RATIOS)
    tokens = " / ".join(f"{visual:,}" for visual in retained)
    bounds = " / ".join(f"{flop_bound(shape, whole, visual + text):.1f}x" for visual in retained)
    return (
        f"No GPU has run this yet: {preset.description}, {preset.dtype}. At {ratios} % it keeps {tokens} visual "
        f"tokens, and the FLOP bounds are {bounds}."
    )


def nothing() -> str:
    """The block before any run."""
    return "\n\n".join([NOT_MEASURED, *map(empty_part, GPU_PRESETS)])


@block("prefill", "prefill_latency_*.json", picture=picture, empty=nothing)
def prefill(results: dict[str, Any]) -> str:
    """Markdown of all presets."""
    by_name = {file.removeprefix("prefill_latency_").removesuffix(".json"): file for file in results}
    names = [name for name in ORDER if name in by_name or name in GPU_PRESETS]
    names += sorted(set(by_name) - set(ORDER))
    return "\n\n".join(part(results[by_name[n]], by_name[n]) if n in by_name else empty_part(n) for n in names)
