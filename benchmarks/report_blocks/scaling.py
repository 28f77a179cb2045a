"""Cost against video length, from benchmarks/scaling.py."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link, png

COLOURS = {"vanilla": "#333333", "score": "#e15759"}


def ratio_of(document: dict[str, Any]) -> float:
    """The compressed engine's retention ratio."""
    return next(row["retention_ratio"] for row in document["fit"] if row["retention_ratio"] is not None)


def part(document: dict[str, Any], file: str) -> str:
    """One line per length: how many times faster than vanilla, and peak memory above rest as a share of vanilla's."""
    rows = {(row["row"], row["frames"]): row for row in document["rows"]}
    lines = []
    for frames in sorted({frames for _, frames in rows}):
        pair = [rows["vanilla", frames], rows["score", frames]]
        if refused := [row["row"] for row in pair if "refused" in row]:
            lines.append([f"{frames:,}", *[""] * 5, f"refused by {' and '.join(refused)}"])
            continue
        plain, ours = pair
        prompts = f"{plain['prompt_tokens']:,} / {ours['prompt_tokens']:,}"
        times = [f"{plain[key]['median'] / ours[key]['median']:.1f}x" for key in ("llm_ms", "total_ms")]
        share = 100 * ours["compressor_ms"]["median"] / ours["total_ms"]["median"]
        grown = [row["peak_bytes_above_rest"] / 2**20 for row in pair]
        memory = f"{grown[0]:,.0f} / {grown[1]:,.0f}"
        lines.append([f"{frames:,}", prompts, *times, f"{share:.0f}%", memory, ""])
    names = [
        "frames",
        "prompt, vanilla / SCORE",
        "LLM faster",
        "request faster",
        "compressor's share",
        "MiB above rest",
    ]
    shown = [*names, "refused"] if any(line[-1] for line in lines) else names
    body = table(shown, [line[: len(shown)] for line in lines])
    context = document["fit"][0]["context_tokens"]
    longest = {
        row["row"]: f"{'at least ' if row['at_limit'] else ''}{row['longest_frames']:,}" for row in document["fit"]
    }
    ratio = ratio_of(document)
    sentence = (
        f"Longest video in a context of {context:,} tokens: {longest['vanilla']} frames with vanilla, "
        f"{longest['score']} with SCORE {ratio:.0%}."
    )
    arguments = document["arguments"]
    caption = (
        f"(SCORE {ratio:.0%}; frames of {arguments['width']}x{arguments['height']}, medians of {arguments['repeats']}; "
        f"{document['environment']['machine']}; {document['model']}; {link(file)}, "
        f"[picture](benchmarks/results/{file.removesuffix('.json')}.png))"
    )
    return f"{body}\n\n{sentence}\n\n{caption}"


def picture(document: dict[str, Any], digest: str) -> bytes:
    """Three panels: time, memory, the longest video that fits; refused lengths are gaps.

    Args:
        document: results of ``scaling.py``.
        digest: of that file; stored in the PNG.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    rows, fit, ratio = document["rows"], document["fit"], ratio_of(document)
    lengths = sorted({row["frames"] for row in rows})
    labels = {"vanilla": "vanilla", "score": f"SCORE {ratio:.0%}"}
    figure = Figure(figsize=(13, 4), dpi=90, layout="constrained")
    time, memory, longest = figure.subplots(1, 3)
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
    arguments = document["arguments"]
    size = f"frames of {arguments['width']}x{arguments['height']}"
    figure.suptitle(f"{document['model']}, {size}; {document['environment']['machine']}", fontsize=9)
    return png(figure, digest)


@block("scaling", "scaling_*.json", picture=picture)
def scaling(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(part(document, file) for file, document in results.items())
