"""Servers: under load, while generating, until the first token, and against a video's length."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import row_name
from benchmarks.report import Block, Document, Lines
from benchmarks.report.plot import COLOURS, GREY, Panel, Series, png

MIB = 2**20
WHERE = "{environment[machine]}; {model}"


def clip_of(document: Document) -> str:
    """The clips of a run in words."""
    return "{frames} frames of {width}x{height}".format(**document["arguments"])


def load_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per server and number of users: everything as a multiple of vanilla's, failures as they are."""
    vanilla = {row["concurrency"]: row for row in document["rows"] if row["config"] == "vanilla"}
    lines = []
    for row in document["rows"]:
        base = vanilla[row["concurrency"]]
        if row is base:
            continue
        line = [row["config"], str(row["concurrency"])]
        answered = row["requests_per_second"] and base["requests_per_second"]
        line.append(f"{row['requests_per_second'] / base['requests_per_second']:.2f}x" if answered else "-")
        for key in ("ttft_ms", "itl_ms", "e2e_ms"):
            percentiles = ("p50", "p95", "p99") if answered and row[key] and base[key] else ()
            line.append(" / ".join(f"{row[key][p] / base[key][p]:.2f}" for p in percentiles) or "-")
        line.append(f"{row['peak_rss_bytes'] / base['peak_rss_bytes']:.2f}x")
        lines.append([*line, f"{row['failures']} + {base['failures']} of {row['requests']} each"])
    names = ["TTFT", "between tokens", "whole answer", "memory", "failed, ours + vanilla's"]
    return ["", "users", "throughput", *names], lines


def load_picture(document: Document, digest: str) -> bytes:
    """Throughput, time to first token and inter-token latency against users, a line per configuration."""
    rows = document["rows"]
    users = sorted({row["concurrency"] for row in rows})

    def panel(title: str, key: str, percentile: str | None = None) -> Panel:
        series = []
        for name, colour in zip(dict.fromkeys(row["config"] for row in rows), (GREY, *COLOURS), strict=False):
            own = [row for row in rows if row["config"] == name and row[key] is not None]
            values = [row[key] if percentile is None else row[key][percentile] for row in own]
            series.append(Series(name, values, [row["concurrency"] for row in own], style={"color": colour}))
        return Panel(title, series, x="concurrent users", ticks=users)

    panels = [
        panel("requests per second", "requests_per_second"),
        panel("TTFT p95, ms", "ttft_ms", "p95"),
        panel("inter-token latency p50, ms", "itl_ms", "p50"),
    ]
    about = f"{document['model']}, {clip_of(document)}, {document['arguments']['max_tokens']} tokens out"
    return png(f"{about}\n{document['environment']['machine']}", panels, digest, (13, 4))


BENCH_SERVE = "vllm bench serve"


def crosscheck_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per server: what vLLM's client measured as a multiple of what ours did."""
    rows = {(row["config"], row["client"] == BENCH_SERVE): row for row in document["rows"]}
    client = next(row["client"] for row in document["rows"] if row["client"] != BENCH_SERVE)
    lines = []
    for config in dict.fromkeys(config for config, _ in rows):
        ours, theirs = rows[config, False], rows[config, True]
        keys = ("requests_per_second", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms")
        shares = [f"{theirs[key] / ours[key]:.2f}x" for key in keys]
        lines.append([config, *shares, f"{ours['failures']} / {theirs['failures']}"])
    header = [f"bench serve / {client}", "requests/s", "TTFT p50", "TTFT p95", "TPOT p50"]
    return [*header, f"failed, {client} / bench"], lines


def generation_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per number of streams: the gap between tokens of each row as a multiple of vanilla's."""
    by_key = {(row["streams"], row["row"]): row["gap_ms"]["median"] for row in document["rows"]}
    names = [name for name in dict.fromkeys(name for _, name in by_key) if name != "vanilla"]
    lines = [
        [str(streams), *[f"{by_key[streams, name] / by_key[streams, 'vanilla']:.2f}x" for name in names]]
        for streams in dict.fromkeys(streams for streams, _ in by_key)
    ]
    return ["streams at once", *names], lines


def ttft_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per row: the median of each stage as a share of vanilla's median time to first token."""
    rows = document["rows"]
    whole = next(row for row in rows if row["row"] == "vanilla")["ttft_ms"]["median"]
    stages = list(rows[0]["stages_ms"])
    lines = []
    for row in rows:
        shares = [f"{100 * row['stages_ms'][stage]['median'] / whole:.1f}" for stage in stages]
        ttft = row["ttft_ms"]["median"]
        totals = [f"{100 * ttft / whole:.0f}", f"{whole / ttft:.2f}x"]
        lines.append([row["row"], str(row["prompt_tokens"]), *shares, *totals])
    return ["% of vanilla's TTFT", "prompt", *stages, "TTFT", "vs vanilla"], lines


def ttft_picture(document: Document, digest: str) -> bytes:
    """Stacked bars of the stages' medians, one bar per row, with the median of the whole at its end."""
    rows = document["rows"]
    series = [
        Series(stage, [row["stages_ms"][stage]["median"] for row in rows], style={"color": colour})
        for stage, colour in zip(rows[0]["stages_ms"], (COLOURS[9], *COLOURS[5:8], *COLOURS[1:5]), strict=True)
    ]
    ends = [f"{row['ttft_ms']['median']:.0f} ms" for row in rows]
    series.append(Series("", [0.0] * len(rows), texts=ends))
    x = "milliseconds: bars are medians of each stage, numbers are medians of the whole"
    about = f"Time to first token, {document['model']}, {clip_of(document)}"
    title = f"{about}\n{document['environment']['machine']}; clips over the loopback"
    panel = Panel("", series, [row["row"] for row in rows], "stack", x)
    return png(title, [panel], digest, (9, 0.62 * len(rows) + 2.2))


def questions_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per run: throughput against the cache switched off, and how many cells were encoded."""
    rows = document["rows"]
    off = next(row for row in rows if row["row"] == "cache off")["requests_per_second"]
    lines = []
    for row in rows:
        cells = row["encoded_cells"] + row["reused_cells"]
        lines.append([row["row"], f"{row['requests_per_second'] / off:.2f}x", f"{row['encoded_cells']:,} of {cells:,}"])
    return ["", "throughput vs cache off", "cells encoded"], lines


def reuse_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per case: cells encoded, the median of the time to first token, and against vanilla and a cold start."""
    rows = document["rows"]
    ttft = {row["row"]: row["ttft_ms"]["median"] for row in rows}
    lines = []
    for row in rows:
        encoded = " or ".join(f"{some} of {cells}" for some, cells in row["encoded_of_cells"])
        own = ttft[row["row"]]
        vit = f"{100 * row['stages_ms']['ViT']['median'] / ttft['vanilla']:.1f}"
        lines.append(
            [row["row"], encoded, vit, f"{ttft['vanilla'] / own:.2f}x", f"{ttft['cold, cache off'] / own:.2f}x"]
        )
    return ["", "cells encoded", "ViT, % of vanilla's TTFT", "TTFT vs vanilla", "vs cold, cache off"], lines


def scaled_ratio(document: Document) -> str:
    """The compressed engine's retention ratio, as in "SCORE 10%"."""
    ratio = next(row["retention_ratio"] for row in document["fit"] if row["retention_ratio"] is not None)
    return row_name(ratio)


def scaling_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per length: how many times faster than vanilla, and peak memory above rest of both."""
    rows = {(row["row"], row["frames"]): row for row in document["rows"]}
    lines = []
    for frames in sorted({frames for _, frames in rows}):
        plain, ours = pair = [rows["vanilla", frames], rows["score", frames]]
        if refused := [row["row"] for row in pair if "refused" in row]:
            lines.append([f"{frames:,}", *[""] * 5, f"refused by {' and '.join(refused)}"])
            continue
        prompts = f"{plain['prompt_tokens']:,} / {ours['prompt_tokens']:,}"
        times = [f"{plain[key]['median'] / ours[key]['median']:.1f}x" for key in ("llm_ms", "total_ms")]
        share = 100 * ours["compressor_ms"]["median"] / ours["total_ms"]["median"]
        memory = " / ".join(f"{row['peak_bytes_above_rest'] / MIB:,.0f}" for row in pair)
        lines.append([f"{frames:,}", prompts, *times, f"{share:.0f}%", memory, ""])
    header = ["frames", "prompt, vanilla / SCORE", "LLM faster", "request faster", "compressor's share"]
    header += ["MiB above rest", "refused"]
    width = len(header) if any(line[-1] for line in lines) else len(header) - 1
    return header[:width], [line[:width] for line in lines]


def scaling_longest(document: Document) -> str:
    """The sentence about the longest video that fits."""
    found = {
        row["row"]: f"{'at least ' if row['at_limit'] else ''}{row['longest_frames']:,}" for row in document["fit"]
    }
    context = document["fit"][0]["context_tokens"]
    return (
        f"Longest video in a context of {context:,} tokens: {found['vanilla']} frames with vanilla, "
        f"{found['score']} with {scaled_ratio(document)}."
    )


def scaling_caption(document: Document) -> str:
    """Ratio, size and repeats."""
    run = "frames of {width}x{height}, medians of {repeats}".format(**document["arguments"])
    return f"{scaled_ratio(document)}; {run}; {WHERE.format(**document)}"


def scaling_picture(document: Document, digest: str) -> bytes:
    """Time, memory, and the longest video that fits; refused lengths are gaps."""
    rows, fit = document["rows"], document["fit"]
    ticks = sorted({row["frames"] for row in rows})
    labels = {"vanilla": "vanilla", "score": scaled_ratio(document)}
    colours = {"vanilla": GREY, "score": COLOURS[2]}

    def line(name: str, key: str, more: str = "", **style: Any) -> Series:
        own = [row for row in rows if row["row"] == name and "refused" not in row]
        values = [row[key] / MIB if key.startswith("peak") else row[key]["median"] for row in own]
        return Series(
            labels[name] + more, values, [row["frames"] for row in own], style={"color": colours[name], **style}
        )

    times = [line(name, "total_ms") for name in labels]
    times += [line(name, "llm_ms", ", LLM only", linestyle="--", alpha=0.6) for name in labels]
    memory = [line(name, "peak_bytes_above_rest") for name in labels]
    names = [labels[row["row"]] + (" (search limit)" if row["at_limit"] else "") for row in fit]
    longest = [row["longest_frames"] for row in fit]
    bars = Series(
        "", longest, texts=[str(count) for count in longest], style={"color": [colours[r["row"]] for r in fit]}
    )
    panels = [
        Panel("one request, ms", times, x="frames", ticks=ticks, log=True),
        Panel("peak memory above rest, MiB", memory, x="frames", ticks=ticks),
        Panel(f"longest video in a context of {fit[0]['context_tokens']} tokens, frames", [bars], names, "bar"),
    ]
    size = "frames of {width}x{height}".format(**document["arguments"])
    return png(f"{document['model']}, {size}; {document['environment']['machine']}", panels, digest, (13, 4))


def decode_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per clip, number at once and loader: medians, and multiples of vLLM's opencv loader's."""
    base = {(r["clip"], r["concurrency"]): r for r in document["rows"] if r["loader"] == "opencv"}
    lines = []
    for row in document["rows"]:
        other = base[row["clip"], row["concurrency"]]
        throughput = f"{row['clips_per_second'] / other['clips_per_second']:.2f}x"
        peak = f"{row['peak_bytes'] / MIB:.0f} MiB ({row['peak_bytes'] / max(1, other['peak_bytes']):.2f}x)"
        cpu = f"{row['cpu_seconds']:.2f} s ({row['cpu_seconds'] / other['cpu_seconds']:.2f}x)"
        line = [row["clip"], str(row["concurrency"]), row["loader"], f"{row['ms']['median']:.0f}"]
        lines.append([*line, throughput, cpu, peak])
    return ["clip", "at once", "loader", "ms for all", "throughput", "processor time", "peak memory"], lines


BLOCKS = {
    "decode": Block(
        pattern="decode_*.json",
        rows=decode_rows,
        caption="multiples of vLLM's opencv loader; {repeats} round(s) after one of warm-up; load average "
        "{environment[load_average_at_start]:.0f} at the start, {load_average_at_end:.0f} at the end; "
        "{environment[machine]}",
    ),
    "load": Block(
        pattern="load_*.json",
        rows=load_rows,
        caption="multiples of vanilla vLLM's at the same number of users; "
        "latencies: p50 / p95 / p99, below 1 is better; " + WHERE,
        picture=load_picture,
    ),
    "generation": Block(
        pattern="generation_*.json",
        rows=generation_rows,
        caption="{arguments[max_tokens]} tokens per stream, medians of {arguments[repeats]} rounds; " + WHERE,
    ),
    "crosscheck": Block(
        pattern="crosscheck_*.json",
        rows=crosscheck_rows,
        caption="{arguments[requests]} requests, {arguments[concurrency]} users, both clients saw exactly the right "
        "prompt tokens; " + WHERE,
    ),
    "ttft_stages": Block(
        pattern="ttft_stages_*.json", rows=ttft_rows, caption="medians; " + WHERE, picture=ttft_picture
    ),
    "reuse": Block(
        pattern="reuse_*.json",
        rows=reuse_rows,
        caption="medians of {arguments[repeats]}; {arguments[frames]} frames a clip, ratios {arguments[ratios]}; "
        + WHERE,
        picture=ttft_picture,
    ),
    "questions": Block(
        pattern="questions_*.json",
        rows=questions_rows,
        caption="{arguments[users]} users, {arguments[questions]} questions about each of {arguments[clips]} clips at "
        "ratios {arguments[ratios]}, every other cache off; " + WHERE,
    ),
    "scaling": Block(
        pattern="scaling_*.json",
        rows=scaling_rows,
        before=scaling_longest,
        caption=scaling_caption,
        picture=scaling_picture,
    ),
}
