"""Throughput and waiting under load, from benchmarks/load/drive.py."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link


def part(document: dict[str, Any], file: str) -> str:
    """One line per server and number of users: throughput and inter-token latency as multiples of vanilla's."""
    rows = document["rows"]
    vanilla = {row["concurrency"]: row for row in rows if row["config"] == "vanilla"}
    lines = []
    for row in rows:
        base = vanilla[row["concurrency"]]
        line = [row["config"], str(row["concurrency"])]
        line.append(f"{row['requests_per_second'] / base['requests_per_second']:.2f}x")
        line += [f"{row['ttft_ms'][p] / base['ttft_ms'][p]:.2f}x" for p in ("p50", "p95", "p99")]
        line += [f"{row['itl_ms'][p] / base['itl_ms'][p]:.2f}x" for p in ("p50", "p95")]
        lines.append([*line, f"{row['failures']} of {row['requests']}"])
    header = ["", "users", "throughput", "TTFT p50", "p95", "p99", "between tokens p50", "p95", "failed"]
    caption = (
        f"(multiples of vanilla vLLM at the same number of users; {document['environment']['machine']}; "
        f"{document['model']}; {link(file)})"
    )
    return f"{table(header, lines)}\n\n{caption}"


@block("load", "load_[cg]pu.json")
def load(results: dict[str, Any]) -> str:
    """Markdown of each machine's results."""
    return "\n\n".join(part(document, file) for file, document in results.items())
