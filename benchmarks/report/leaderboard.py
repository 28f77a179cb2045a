"""Every method at every ratio on every world, best first, with the commit and the day of each row."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness import percent, table
from benchmarks.report import NOT_MEASURED, Block, Document, Lines, link
from benchmarks.report.accuracy import accuracy_cell, vanilla_row

WORLDS = {"accuracy_world.json": "The drawn world", "accuracy_footage.json": "Real footage"}
# Methods are in the order of their accuracy at this ratio; questions by kind are shown at it.
RATIO = 0.1


def ranking(document: Document) -> tuple[list[str], Lines]:
    """All tokens first, then one line per method, the best at :data:`RATIO` on top."""
    by_key = {(row["method"], row["retention_ratio"]): row for row in document["rows"]}
    ratios = sorted({ratio for _, ratio in by_key} - {1.0}, reverse=True)
    names = sorted({name for name, ratio in by_key if ratio != 1.0}, key=lambda n: (-_accuracy(by_key, n), n))
    vanilla = by_key["vanilla", 1.0]
    lines = [["", "all tokens", "", *[f"{100 * vanilla['accuracy']:.1f}"] * len(ratios), *_made(document, "vanilla")]]
    for place, name in enumerate(names, 1):
        cells = [accuracy_cell(by_key.get((name, ratio))) for ratio in ratios]
        seeds = max(len(row["seeds"]) for (one, _), row in by_key.items() if one == name)
        lines.append([str(place), name, f"trained, {seeds} seeds" if seeds else "", *cells, *_made(document, name)])
    return ["", "right answers, %", "training", *map(percent, ratios), "commit", "date"], lines


def by_kind(document: Document) -> tuple[list[str], Lines]:
    """Right answers at :data:`RATIO` by kind of question, in the ranking's order."""
    rows = [row for row in document["rows"] if row["retention_ratio"] in (RATIO, 1.0)]
    rows.sort(key=lambda row: (row["retention_ratio"] != 1.0, -row["accuracy"], row["method"]))
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    names = {"vanilla": "all tokens"}
    lines = [
        [names.get(row["method"], row["method"]), *(f"{100 * row['kinds'][kind]:.1f}" for kind in kinds)]
        for row in rows
    ]
    return [f"at {percent(RATIO)}, %", *kinds], lines


def _accuracy(by_key: dict[tuple[str, float], dict[str, Any]], name: str) -> float:
    row = by_key.get((name, RATIO))
    return -1.0 if row is None else float(row["accuracy"])


def _made(document: Document, method: str) -> list[str]:
    """Commit and day of a method's row; a later run's where it was measured again."""
    environment = document["environment"]
    for run in document.get("added", ()):
        if method in run["methods"]:
            environment = run["environment"]
    changed = "*" if environment["uncommitted_changes"] else ""
    return [f"{environment['commit']}{changed}", environment["time"][:10]]


def whole(results: dict[str, Document], _: Any) -> str:
    """One section per world."""
    parts = []
    for file, title in WORLDS.items():
        if (document := results.get(file)) is None:
            parts.append(f"### {title}\n\n{NOT_MEASURED}")
            continue
        right = vanilla_row(document)["accuracy"]
        error = 100 * math.sqrt(right * (1 - right) / document["questions"])
        about = (
            f"({document['questions']:,} questions about {document['clips']} held-out clips, the same for every row: "
            f"by chance alone the row of all tokens has a standard error of {error:.1f} points, "
            f"more as questions share clips; ± is the standard "
            f"deviation over seeds; * uncommitted changes; {link(file)})"
        )
        parts.append(f"### {title}\n\n{table(*ranking(document))}\n\n{about}\n\n{table(*by_kind(document))}")
    return "\n\n".join(parts) if set(WORLDS) & set(results) else NOT_MEASURED


BLOCKS = {
    "leaderboard": Block(pattern="accuracy_*.json", rows=ranking, caption="", whole=whole),
}
