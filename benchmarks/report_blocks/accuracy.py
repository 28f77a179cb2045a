"""Accuracy on the synthetic world, from benchmarks/accuracy_world.py: a table, and a line per method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import table

from report_blocks import block, link, png

# Agreement of the server with the transformers path has a file and a sentence of its own.
SERVED = "served_agreement.json"


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per method, one column per ratio below 1: right answers in percent, with the spread over seeds."""
    ratios = sorted({row["retention_ratio"] for row in rows} - {1.0}, reverse=True)
    by_key = {(row["method"], row["retention_ratio"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows if row["retention_ratio"] != 1.0):
        cells = [name]
        for ratio in ratios:
            row = by_key.get((name, ratio))
            if row is None:
                cells.append("")
                continue
            spread = f" ± {100 * row['spread']:.1f}" if row["spread"] is not None else ""
            # An asked ratio of 10 % of 1,024 tokens is 102 of them: 9.96 %.
            missed = f" (kept {row['achieved_ratio']:.1%})" if abs(row["achieved_ratio"] - ratio) > 0.002 else ""
            cells.append(f"{100 * row['accuracy']:.1f}{spread}{missed}")
        lines.append(cells)
    return table(["right answers, %", *(f"{ratio:.0%}" for ratio in ratios)], lines)


def picture(document: dict[str, Any], digest: str) -> bytes:
    """Accuracy against retention ratio as a PNG; bars are the spread over seeds.

    Args:
        document: results of ``accuracy_world.py``.
        digest: of that file; stored in the PNG.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    rows = document["rows"]
    vanilla = next(row for row in rows if row["method"] == "vanilla")["accuracy"]
    figure = Figure(figsize=(8, 5), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * vanilla, color="black", linewidth=1, linestyle=":", label="vanilla (all tokens)")
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != "vanilla")
    for number, name in enumerate(names):
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["retention_ratio"])
        ours = bool(mine[0]["seeds"])
        axes.errorbar(
            [100 * row["retention_ratio"] for row in mine],
            [100 * row["accuracy"] for row in mine],
            yerr=[100 * (row["spread"] or 0) for row in mine],
            label=name,
            color="black" if name == "score" else f"C{number % 10}",
            marker="o" if ours else "x",
            linewidth=2.5 if name == "score" else 1.2,
            linestyle="-" if ours else "--",
            capsize=3,
        )
    axes.set_xlabel("retention ratio, %")
    axes.set_ylabel("right answers, %")
    axes.set_title(f"{document['questions']} held-out questions; a model trained from scratch on the synthetic world")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure, digest)


def all_tokens(document: dict[str, Any]) -> str:
    """What the model answers rightly without compression, for a caption."""
    vanilla = next(row for row in document["rows"] if row["method"] == "vanilla")
    return f"with all tokens {100 * vanilla['accuracy']:.1f}"


@block("accuracy", "accuracy_world.json", picture=picture)
def accuracy(results: dict[str, Any]) -> str:
    """Markdown of the table and the picture."""
    ((file, document),) = results.items()
    seeds = max(len(row["seeds"]) for row in document["rows"])
    caption = (
        f"({all_tokens(document)}; {document['questions']} held-out questions about {document['clips']} clips; trained "
        f"policies: mean and standard deviation of {seeds} seeds; {link(file)})"
    )
    return f"{accuracy_table(document['rows'])}\n\n{caption}\n\n![accuracy](benchmarks/results/accuracy_world.png)"


@block("served_agreement", SERVED)
def served_agreement(results: dict[str, Any]) -> str:
    """A sentence: how many served answers equal the transformers path's."""
    rows = results[SERVED]["rows"]
    parts = [f"{row['agree']} of {row['clips']} at ratio {row['retention_ratio']:g}" for row in rows]
    return f"Served answers that equal the transformers path's, token for token: {', '.join(parts)} ({link(SERVED)})."
