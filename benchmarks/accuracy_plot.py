"""Accuracy against retention ratio, from a results file of accuracy_world.py."""

from __future__ import annotations

import json
from pathlib import Path


def plot(results: Path) -> Path:
    """Draw a line per method, with the spread over seeds as bars.

    Args:
        results: JSON of ``accuracy_world.py``.

    Returns:
        The PNG beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(results.read_text())
    rows = content["rows"]
    vanilla = next(row for row in rows if row["method"] == "vanilla")["accuracy"]
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.axhline(100 * vanilla, color="black", linewidth=1, linestyle=":", label="vanilla (all tokens)")
    for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "vanilla"):
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["retention_ratio"])
        ours = bool(mine[0]["seeds"])
        axes.errorbar(
            [100 * row["retention_ratio"] for row in mine],
            [100 * row["accuracy"] for row in mine],
            yerr=[100 * (row["spread"] or 0) for row in mine],
            label=name,
            marker="o" if ours else "x",
            linewidth=2.5 if name == "score" else 1.2,
            linestyle="-" if ours else "--",
            capsize=3,
        )
    axes.set_xlabel("retention ratio, %")
    axes.set_ylabel("right answers, %")
    axes.set_title(f"{content['questions']} held-out questions, model trained from scratch on the synthetic world")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    picture = results.with_suffix(".png")
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return picture
