"""Where the time to first token goes, from benchmarks/ttft_stages.py."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, clip_of, link, png

# One per stage, in their order.
COLOURS = ("#bab0ac", "#9c755f", "#edc948", "#d4d4d4", "#4e79a7", "#59a14f", "#e15759", "#b07aa1")


def part(document: dict[str, Any], file: str) -> str:
    """One line per row: the median of each stage as a share of vanilla's median time to first token."""
    rows = document["rows"]
    whole = next(row for row in rows if row["row"] == "vanilla")["ttft_ms"]["median"]
    stages = list(rows[0]["stages_ms"])
    lines = []
    for row in rows:
        shares = [f"{100 * row['stages_ms'][stage]['median'] / whole:.1f}" for stage in stages]
        ttft = row["ttft_ms"]["median"]
        lines.append(
            [row["row"], str(row["prompt_tokens"]), *shares, f"{100 * ttft / whole:.0f}", f"{whole / ttft:.2f}x"]
        )
    header = ["% of vanilla's TTFT", "prompt", *stages, "TTFT", "vs vanilla"]
    caption = (
        f"(medians; {document['environment']['machine']}; {document['model']}; {link(file)}, "
        f"[picture](benchmarks/results/{file.removesuffix('.json')}.png))"
    )
    return f"{table(header, lines)}\n\n{caption}"


def picture(document: dict[str, Any], digest: str) -> bytes:
    """Stacked bars of the stages' medians, one bar per row.

    Args:
        document: results of ``ttft_stages.py``.
        digest: of that file; stored in the PNG.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    rows = document["rows"]
    figure = Figure(figsize=(9, 0.62 * len(rows) + 2.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    lefts = [0.0] * len(rows)
    places = range(len(rows))
    for stage, colour in zip(rows[0]["stages_ms"], COLOURS, strict=True):
        widths = [row["stages_ms"][stage]["median"] for row in rows]
        axes.barh(places, widths, left=lefts, color=colour, label=stage, height=0.66)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, left, row in zip(places, lefts, rows, strict=True):
        axes.text(left, place, f"  {row['ttft_ms']['median']:.0f} ms", va="center", fontsize=9)
    axes.set_yticks(list(places), [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(lefts) * 1.12)
    axes.set_xlabel("milliseconds: bars are medians of each stage, numbers are medians of the whole")
    about = f"Time to first token, {document['model']}, {clip_of(document)}"
    axes.set_title(f"{about}\n{document['environment']['machine']}; clips over the loopback", fontsize=9)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3 if len(rows) < 4 else -0.2))
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure, digest)


@block("ttft_stages", "ttft_stages_*.json", picture=picture)
def ttft_stages(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(part(document, file) for file, document in results.items())
