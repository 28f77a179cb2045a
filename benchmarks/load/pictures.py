"""The load test's picture: throughput, time to first token and inter-token latency against concurrency."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#333333", "#59a14f", "#4e79a7", "#e15759", "#f28e2b", "#b07aa1")


def draw_load(rows: Sequence[dict[str, Any]], title: str, results: Path) -> None:
    """Three panels, a line per configuration; written atomically beside the results file as ``.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def p(row: dict[str, Any], key: str, name: str) -> float:
        return float("nan") if row[key] is None else row[key][name]

    panels = (
        ("requests per second", lambda row: row["requests_per_second"]),
        ("TTFT p95, ms", lambda row: p(row, "ttft_ms", "p95")),
        ("inter-token latency p50, ms", lambda row: p(row, "itl_ms", "p50")),
    )
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    users = sorted({row["concurrency"] for row in rows})
    names = list(dict.fromkeys(row["config"] for row in rows))
    for ax, (label, value) in zip(axes, panels, strict=True):
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            own = [row for row in rows if row["config"] == name]
            ax.plot([row["concurrency"] for row in own], [value(row) for row in own], "o-", color=colour, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(users, [str(count) for count in users])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel("concurrent users")
        ax.set_title(label, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    picture = results.with_suffix(".png")
    partial = picture.with_name(f".{picture.name}")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    os.replace(partial, picture)
