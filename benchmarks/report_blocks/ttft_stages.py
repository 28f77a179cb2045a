"""Where the time to first token goes, from benchmarks/ttft_stages.py."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link


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


@block("ttft_stages", "ttft_stages_*.json")
def ttft_stages(results: dict[str, Any]) -> str:
    """Markdown of each results file."""
    return "\n\n".join(part(document, file) for file, document in results.items())
