"""Throughput and waiting under load, from benchmarks/load/drive.py, and the check of its client by another one."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, clip_of, link, png

COLOURS = ("#333333", "#59a14f", "#4e79a7", "#e15759", "#f28e2b", "#b07aa1")


def part(document: dict[str, Any], file: str) -> str:
    """One line per server and number of users: everything as a multiple of vanilla's, failures as they are."""
    rows = document["rows"]
    vanilla = {row["concurrency"]: row for row in rows if row["config"] == "vanilla"}
    lines = []
    for row in rows:
        base = vanilla[row["concurrency"]]
        if row is not base:
            line = [row["config"], str(row["concurrency"])]
            line.append(f"{row['requests_per_second'] / base['requests_per_second']:.2f}x")
            for key in ("ttft_ms", "itl_ms", "e2e_ms"):
                line.append(" / ".join(f"{row[key][p] / base[key][p]:.2f}" for p in ("p50", "p95", "p99")))
            line.append(f"{row['peak_rss_bytes'] / base['peak_rss_bytes']:.2f}x")
            lines.append([*line, f"{row['failures']} + {base['failures']} of {row['requests']} each"])
    header = ["", "users", "throughput", "TTFT", "between tokens", "whole answer", "memory", "failed, ours + vanilla's"]
    caption = (
        "(multiples of vanilla vLLM's at the same number of users; latencies: p50 / p95 / p99, below 1 is better; "
        f"{document['environment']['machine']}; {document['model']}; {link(file)}, "
        f"[picture](benchmarks/results/{file.removesuffix('.json')}.png))"
    )
    return f"{table(header, lines)}\n\n{caption}"


def picture(document: dict[str, Any], digest: str) -> bytes:
    """Three panels, a line per configuration: throughput, time to first token, inter-token latency.

    Args:
        document: results of ``load/drive.py``.
        digest: of that file; stored in the PNG.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    rows = document["rows"]

    def p(row: dict[str, Any], key: str, name: str) -> float:
        return float("nan") if row[key] is None else row[key][name]

    panels = (
        ("requests per second", lambda row: row["requests_per_second"]),
        ("TTFT p95, ms", lambda row: p(row, "ttft_ms", "p95")),
        ("inter-token latency p50, ms", lambda row: p(row, "itl_ms", "p50")),
    )
    figure = Figure(figsize=(13, 4), dpi=90, layout="constrained")
    axes = figure.subplots(1, 3)
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
    arguments = document["arguments"]
    about = f"{document['model']}, {clip_of(document)}, {arguments['max_tokens']} tokens out"
    figure.suptitle(f"{about}\n{document['environment']['machine']}", fontsize=9)
    return png(figure, digest)


@block("load", "load_*.json", picture=picture)
def load(results: dict[str, Any]) -> str:
    """Markdown of each machine's results."""
    return "\n\n".join(part(document, file) for file, document in results.items())


def crosscheck_part(document: dict[str, Any], file: str) -> str:
    """One line per server: what vLLM's client measured as a multiple of what ours did."""
    rows = document["rows"]
    lines = []
    for config in dict.fromkeys(row["config"] for row in rows):
        ours, theirs = (
            next(row for row in rows if row["config"] == config and (row["client"] == "locust") is mine)
            for mine in (True, False)
        )
        keys = ("requests_per_second", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms")
        lines.append([config, *[f"{theirs[key] / ours[key]:.2f}x" for key in keys]])
        lines[-1].append(f"{ours['failures']} / {theirs['failures']}")
    header = ["bench serve / locust", "requests/s", "TTFT p50", "TTFT p95", "TPOT p50", "failed, locust / bench"]
    arguments = document["arguments"]
    caption = (
        f"({arguments['requests']} requests, {arguments['concurrency']} users, both clients saw exactly the right "
        f"prompt tokens; {document['environment']['machine']}; {document['model']}; {link(file)})"
    )
    return f"{table(header, lines)}\n\n{caption}"


@block("crosscheck", "crosscheck_*.json")
def crosscheck(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(crosscheck_part(document, file) for file, document in results.items())


def decode_part(document: dict[str, Any], file: str) -> str:
    """One line per number of streams: the gap between tokens of each row as a multiple of vanilla's."""
    by_key = {(row["streams"], row["row"]): row["gap_ms"]["median"] for row in document["rows"]}
    names = [name for name in dict.fromkeys(name for _, name in by_key) if name != "vanilla"]
    lines = []
    for streams in dict.fromkeys(streams for streams, _ in by_key):
        base = by_key[streams, "vanilla"]
        lines.append([str(streams), *[f"{by_key[streams, name] / base:.2f}x" for name in names]])
    arguments = document["arguments"]
    caption = (
        f"({arguments['max_tokens']} tokens per stream, medians of {arguments['repeats']} rounds; "
        f"{document['environment']['machine']}; {document['model']}; {link(file)})"
    )
    return f"{table(['streams at once', *names], lines)}\n\n{caption}"


@block("decode", "decode_*.json")
def decode(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(decode_part(document, file) for file, document in results.items())
