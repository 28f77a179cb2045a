"""Accuracy: on the synthetic world, of the server against transformers, and on public sets."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import percent
from benchmarks.report import NOT_MEASURED, Block, Document, Lines, link
from benchmarks.report.plot import GREY, Panel, Series, png

# Ablations and the training variant stay off the first page.
SERVED = ("score", "flashvid", "tango", "evs", "vidcom2", "vcast", "holitom", "fastvid", "dycoke", "uniform", "random")


def accuracy_cell(row: dict[str, Any] | None) -> str:
    """Right answers in percent, with the spread over seeds, and what was really kept where that is something else."""
    if row is None:
        return ""
    spread = f" ± {100 * row['spread']:.1f}" if row["spread"] is not None else ""
    # An asked ratio of 10 % of 1,024 tokens is 102 of them: 9.96 %.
    achieved = row["achieved_ratio"]
    missed = f" (kept {achieved:.1%})" if abs(achieved - row["retention_ratio"]) > 0.002 else ""
    return f"{100 * row['accuracy']:.1f}{spread}{missed}"


def world_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per method, one column per ratio below 1: right answers in percent, with the spread over seeds."""
    by_key = {(row["method"], row["retention_ratio"]): row for row in document["rows"] if row["retention_ratio"] != 1.0}
    ratios = sorted({ratio for _, ratio in by_key}, reverse=True)
    names = dict.fromkeys(name for name, _ in by_key)
    lines = [[name, *(accuracy_cell(by_key.get((name, ratio))) for ratio in ratios)] for name in names]
    return ["right answers, %", *map(percent, ratios)], lines


def vanilla_row(document: Document) -> dict[str, Any]:
    """That of all tokens."""
    found: dict[str, Any] = next(row for row in document["rows"] if row["method"] == "vanilla")
    return found


def summary_rows(document: Document) -> tuple[list[str], Lines]:
    """The rows of what is served, best known first."""
    header, lines = world_rows(document)
    served = [line for line in lines if line[0] in SERVED]
    return header, sorted(served, key=lambda line: SERVED.index(line[0]))


def asked(document: Document) -> str:
    """What the model answers rightly without compression, and how much was asked."""
    about = f"{document['questions']} held-out questions about {document['clips']} clips"
    return f"with all tokens {100 * vanilla_row(document)['accuracy']:.1f}; {about}"


def world_caption(document: Document) -> str:
    """What was asked, and of how many trainings."""
    seeds = max(len(row["seeds"]) for row in document["rows"])
    later = "".join(f"; {', '.join(run['methods'])}: {run['note']}" for run in document.get("added", ()))
    return f"{asked(document)}; trained policies: mean and standard deviation of {seeds} seeds{later}"


def curves(document: Document, all_tokens: str, black: str = "") -> Panel:
    """Accuracy against retention ratio; trained policies are solid, bars are the spread over seeds.

    Args:
        document: results.
        all_tokens: legend of the line of the uncompressed model.
        black: the method that stands out.
    """
    rows = [row for row in document["rows"] if row["method"] != "vanilla"]
    level, widest = 100 * vanilla_row(document)["accuracy"], 100 * max(row["retention_ratio"] for row in rows)
    series = [Series(all_tokens, [level] * 2, [0, widest], style={"color": GREY, "linestyle": ":"})]
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted((row for row in rows if row["method"] == name), key=lambda row: row["retention_ratio"])
        trained = bool(mine[0]["seeds"])
        style = {"linestyle": "-" if trained else "--", "marker": "o" if trained else "x", "color": f"C{number % 10}"}
        if name == black:
            style |= {"color": "black", "linewidth": 2.5}
        values, places = [100 * row["accuracy"] for row in mine], [100 * row["retention_ratio"] for row in mine]
        series.append(Series(name, values, places, [100 * (row["spread"] or 0) for row in mine], style=style))
    return Panel("right answers, %", series, x="retention ratio, %")


def world_picture(document: Document, digest: str) -> bytes:
    """The table as curves."""
    title = f"{document['questions']} held-out questions; a model trained from scratch on the synthetic world"
    return png(title, [curves(document, "vanilla (all tokens)", black="score")], digest, (8, 5))


def served_rows(document: Document) -> tuple[list[str], Lines]:
    """Served answers that equal the transformers path's, and that are right."""
    lines = [
        [f"{row['retention_ratio']:g}", str(row["agree"]), str(row["right"]), str(row["clips"])]
        for row in document["rows"]
    ]
    return ["ratio", "same answer", "right answer", "clips"], lines


def served_whole(results: dict[str, Document], _: Any) -> str:
    """A sentence instead of the table."""
    if not results:
        return NOT_MEASURED
    ((file, document),) = results.items()
    parts = [f"{row['agree']} of {row['clips']} at ratio {row['retention_ratio']:g}" for row in document["rows"]]
    said = f"Served answers that equal the transformers path's, token for token: {', '.join(parts)}"
    return f"{said} ({link(file)})."


def public_rows(document: Document) -> tuple[list[str], Lines]:
    """A column per ratio: the set's own figure and its groups in percent with 95 % intervals (withheld where requests
    failed), prompt tokens, and what became of the questions."""
    rows = document["rows"]

    def figure(found: dict[str, Any] | None) -> str:
        return "withheld" if found is None else "{accuracy:.1f} [{low:.1f}, {high:.1f}]".format(**found)

    groups = dict.fromkeys(group for row in rows for group in row["groups"])
    means = [row["prompt_tokens_mean"] for row in rows]
    lines = [[document["headline"], *[figure(row["headline"]) for row in rows]]]
    lines += [[group, *[figure(row["groups"].get(group)) for row in rows]] for group in groups]
    lines.append(["tokens per request", *["-" if mean is None else f"{mean:,.0f}" for mean in means]])
    counts = {"scored": "scored", "unanswered (wrong)": "unanswered", "failed": "failed", "not asked": "not_asked"}
    lines += [[label, *[str(row[key]) for row in rows]] for label, key in counts.items()]
    return [document["title"], *[f"ratio {row['retention_ratio']}" for row in rows]], lines


def public_caption(document: Document) -> str:
    """Model, prompt, and whether the whole set was asked."""
    count, size = document["asked"], document["published_size"]
    part_of = "" if count == size else f", {count} of {size} questions: not the published set's figure"
    partial = "; OVER ANSWERED QUESTIONS ONLY: some requests failed" if document.get("over_answered_only") else ""
    return f"{document['model']}, {document['prompt']} prompt{part_of}{partial}"


BLOCKS = {
    "accuracy": Block(
        pattern="accuracy_world.json",
        rows=world_rows,
        caption=world_caption,
        picture=world_picture,
        embed="accuracy",
    ),
    "accuracy_summary": Block(pattern="accuracy_world.json", rows=summary_rows, caption=asked),
    "served_agreement": Block(
        pattern="served_agreement.json",
        rows=served_rows,
        caption="token for token",
        whole=served_whole,
    ),
    "accuracy_public": Block(pattern="accuracy_*_*.json", rows=public_rows, caption=public_caption),
}
