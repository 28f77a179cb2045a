"""The picture of ``scaling.py``: time and memory against video length, and the longest video that fits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"vanilla": "#333333", "score": "#e15759"}


def draw(rows: Sequence[dict[str, Any]], fit: Sequence[dict[str, Any]], ratio: float, title: str, path: Path) -> None:
    """Three panels; refused lengths are gaps. Written atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({row["frames"] for row in rows})
    labels = {"vanilla": "vanilla", "score": f"SCORE {ratio:.0%}"}
    figure, (time, memory, longest) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, colour in COLOURS.items():
        own = [row for row in rows if row["row"] == name and "refused" not in row]
        frames = [row["frames"] for row in own]
        time.plot(frames, [row["total_ms"]["median"] for row in own], "o-", color=colour, label=labels[name])
        llm = [row["llm_ms"]["median"] for row in own]
        time.plot(frames, llm, "o--", color=colour, alpha=0.6, markersize=3, label=f"{labels[name]}, LLM only")
        above = [row["peak_bytes_above_rest"] / 2**20 for row in own]
        memory.plot(frames, above, "o-", color=colour, label=labels[name])
    time.set_yscale("log")
    time.set_title("one request, ms", fontsize=10)
    memory.set_title("peak memory above rest, MiB", fontsize=10)
    for ax in (time, memory):
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [str(count) for count in lengths])
        ax.tick_params(axis="x", which="minor", bottom=False)
        ax.set_xlabel("frames")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    names = [labels[row["row"]] + (" (search limit)" if row["at_limit"] else "") for row in fit]
    longest.bar(names, [row["longest_frames"] for row in fit], color=[COLOURS[row["row"]] for row in fit], width=0.5)
    for place, row in enumerate(fit):
        longest.text(place, row["longest_frames"], str(row["longest_frames"]), ha="center", va="bottom", fontsize=9)
    context = fit[0]["context_tokens"] if fit else 0
    longest.set_title(f"longest video in a context of {context} tokens, frames", fontsize=10)
    for ax in (time, memory, longest):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    os.replace(partial, path)
