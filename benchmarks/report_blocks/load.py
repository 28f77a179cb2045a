"""Throughput and waiting under load, from benchmarks/load/drive.py, and the check of its client by another one."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link


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


@block("load", "load_*.json")
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
