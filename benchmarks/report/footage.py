"""Accuracy on real footage, and what more to read does to it."""

from __future__ import annotations

from benchmarks.harness import percent, table
from benchmarks.report import Block, Document, Lines
from benchmarks.report.accuracy import curves, vanilla_row, world_rows
from benchmarks.report.plot import GREY, Panel, Series, png

RATIO = 0.1


def _gain(found: dict[str, float | None] | None) -> str:
    """A paired difference in points, with its errors over clips and over backgrounds."""
    if found is None:
        return ""
    errors = (found["se_clips"], found["se_backgrounds"])
    return f"{found['difference']:+.1f} ({', '.join('-' if one is None else f'{one:.1f}' for one in errors)})"


def _ratios(document: Document) -> list[float]:
    return sorted({row["retention_ratio"] for row in document["rows"] if row["method"] != "vanilla"}, reverse=True)


def caption(document: Document) -> str:
    """What was asked of whom."""
    plain, grounds = vanilla_row(document), document["backgrounds"]
    return (
        f"with all tokens {100 * plain['accuracy']:.1f}, with none {100 * plain['blind']['accuracy']:.1f}; "
        f"{document['questions']:,} held-out questions about {document['clips']} clips on {len(grounds)} backgrounds "
        f"({', '.join(grounds)}); trained policies: mean and standard deviation over seeds"
    )


def differences(document: Document) -> str:
    """Three tables of paired differences of trained families: over all tokens, the best free method, the reference."""
    trained = [row for row in document["rows"] if row["seeds"]]
    names, asked = list(dict.fromkeys(row["method"] for row in trained)), _ratios(document)
    by_key = {(row["method"], row["retention_ratio"]): row for row in document["rows"]}
    best = {ratio: next(row["best_free"] for row in trained if row["retention_ratio"] == ratio) for ratio in asked}
    parts = []
    for title, other in (
        ("over all tokens", lambda ratio: "vanilla"),
        ("over the best method without training", best.__getitem__),
        (f"over {document['reference']}", lambda ratio: document["reference"]),
    ):
        header = [title, *(f"{percent(ratio)} ({other(ratio)})" for ratio in asked)]
        lines = [
            [name, *(_gain(by_key[name, ratio]["against"].get(other(ratio))) for ratio in asked)]
            for name in names
            if other(asked[0]) != name
        ]
        parts.append(table(header, lines))
    parts.append(
        "(accuracy in points, paired on the same questions; in brackets the standard errors over clips and over "
        "backgrounds)"
    )
    return "\n\n".join(parts)


def kinds(document: Document) -> str:
    """Accuracy by kind of question and by background at :data:`RATIO`."""
    plain = vanilla_row(document)
    rows = [row for row in document["rows"] if row["retention_ratio"] == RATIO]
    rows.sort(key=lambda row: -row["accuracy"])
    parts = []
    for key in ("kinds", "backgrounds"):
        names = sorted(plain[key])
        lines = [["all tokens", *(f"{100 * plain[key][name]:.0f}" for name in names)]]
        if key == "kinds":
            lines.append(["no tokens", *(f"{100 * plain['blind'][key][name]:.0f}" for name in names)])
        lines += [[row["method"], *(f"{100 * row[key][name]:.0f}" for name in names)] for row in rows]
        parts.append(table([f"at {percent(RATIO)}, %", *names], lines))
    return "\n\n".join(parts)


def picture(document: Document, digest: str) -> bytes:
    """The table as curves."""
    title = f"{document['questions']:,} held-out questions about real footage; a small reader of frozen DINOv2 tokens"
    return png(title, [curves(document, "all tokens")], digest, (8, 5))


def rot_rows(document: Document) -> tuple[list[str], Lines]:
    """Accuracy against length and clutter, a line per method and ratio."""
    rows = [row for row in document["rows"] if row["study"] in ("length", "clutter")]
    columns = list(dict.fromkeys((row["study"], row["value"]) for row in rows))
    names = {"length": "{}x long", "clutter": "{} look-alikes"}
    by_key = {(row["method"], row["retention_ratio"], row["study"], row["value"]): row for row in rows}
    lines = []
    for method, ratio in dict.fromkeys((row["method"], row["retention_ratio"]) for row in rows):
        label = "all tokens" if method == "vanilla" else f"{method} {percent(ratio)}"
        cells = []
        for study, value in columns:
            found = by_key[method, ratio, study, value]
            gain = found["against_vanilla"]
            more = "" if method == "vanilla" else f" ({gain['difference']:+.1f} ± {gain['se_clips']:.1f})"
            cells.append(f"{100 * found['accuracy']:.1f}{more}")
        lines.append([label, *cells])
    return ["right answers, %", *(names[study].format(value) for study, value in columns)], lines


def rot_caption(document: Document) -> str:
    """What was asked."""
    asked = sorted({row["questions"] for row in document["rows"]})
    questions = f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
    return (
        f"1x is {document['frames']} frames; {document['clips']} held-out clips and {questions} questions a point, "
        "equally many events everywhere; in brackets the paired difference to all tokens and its standard error over "
        "clips"
    )


def rot_picture(document: Document, digest: str) -> bytes:
    """Three panels: length, clutter, and tokens read."""
    rows = document["rows"]
    panels = []
    for study, label in (("length", "clip length, times training's"), ("clutter", "look-alikes standing there")):
        series = []
        mine = [row for row in rows if row["study"] == study and row["method"] in ("vanilla", document["family"])]
        for number, (method, ratio) in enumerate(dict.fromkeys((r["method"], r["retention_ratio"]) for r in mine)):
            points = [r for r in mine if (r["method"], r["retention_ratio"]) == (method, ratio)]
            name = "all tokens" if method == "vanilla" else percent(ratio)
            style = {"color": GREY, "linewidth": 2.5} if method == "vanilla" else {"color": f"C{number}"}
            series.append(
                Series(name, [100 * r["accuracy"] for r in points], [r["value"] for r in points], style=style)
            )
        ticks = sorted({row["value"] for row in mine}) if study == "length" else ()
        panels.append(Panel(f"{document['family']}, right answers, %", series, x=label, ticks=ticks))
    series = []
    mine = [row for row in rows if row["study"] == "tokens"]
    for name in dict.fromkeys(row["method"] for row in mine):
        points = sorted((row for row in mine if row["method"] == name), key=lambda row: row["tokens"])
        series.append(Series(name, [100 * r["accuracy"] for r in points], [round(r["tokens"]) for r in points]))
    if mine:
        ticks = [2**k for k in range(7, 13)]
        panels.append(Panel(f"clips {mine[0]['value']}x long", series, x="tokens read", ticks=ticks))
    return png("More to read, equally many events", panels, digest, (14, 4.5))


def footage_rows(document: Document) -> tuple[list[str], Lines]:
    """As of the drawn world; methods that read standardised tokens at a ratio are marked."""
    header, lines = world_rows(document)
    starred = {(r["method"], r["retention_ratio"]) for r in document["rows"] if r.get("inputs") == "standardised"}
    asked = _ratios(document)
    return header, [
        [name, *(cell + "*" * ((name, ratio) in starred) for cell, ratio in zip(cells, asked, strict=True))]
        for name, *cells in lines
    ]


BLOCKS = {
    "accuracy_footage": Block(
        pattern="accuracy_footage.json",
        rows=footage_rows,
        caption=lambda document: f"{caption(document)}; * on standardised tokens, where that is better",
        after=lambda document: f"{differences(document)}\n\n{kinds(document)}",
        picture=picture,
        embed="accuracy on real footage",
    ),
    "context_rot": Block(
        pattern="context_rot.json",
        rows=rot_rows,
        caption=rot_caption,
        picture=rot_picture,
        embed="accuracy against length, clutter and tokens",
    ),
}
