"""Every method's time and spread over frames, from benchmarks/methods.py."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link


def part(document: dict[str, Any], file: str) -> str:
    """One line per method: time as a multiple of ``score`` at the same ratio, and kept tokens per frame."""
    rows = [row for row in document["rows"] if not row["fault"]]
    ratios = sorted({row["retention_ratio"] for row in rows}, reverse=True)
    by_key = {(row["method"], row["variant"], row["retention_ratio"]): row for row in rows}
    names = sorted({(method, variant or "") for method, variant, _ in by_key}, key=lambda n: (n[0] != "score", n))
    lines = []
    for method, variant in names:
        line = [f"{method} {variant}".strip()]
        for ratio in ratios:
            row, base = by_key.get((method, variant or None, ratio)), by_key.get(("score", None, ratio))
            line.append(f"{row['ms']['median'] / base['ms']['median']:.2f}x" if row and base else "")
        least = by_key.get((method, variant or None, ratios[-1]))
        kept = least["kept_per_frame"] if least else None
        line.append("" if kept is None else f"{kept['min']} / {kept['median']:g} / {kept['max']}")
        lines.append(line)
    header = ["method", *[f"time at {100 * ratio:g}%" for ratio in ratios]]
    body = table([*header, f"kept per frame at {100 * ratios[-1]:g}%, least / median / most"], lines)
    video = document["video"]
    shape = f"T = {video['T']}, N = {video['N']}, D = {video['D']}, {video['dtype']}, {video['content']}"
    machine, repeats = document["environment"]["machine"], document["repeats"]
    return f"{body}\n\n(times `score`'s on {machine}; {shape}; medians of {repeats}; {link(file)})"


@block("methods", "methods_[cg]pu.json")
def methods(results: dict[str, Any]) -> str:
    """Markdown of each machine's results."""
    return "\n\n".join(part(document, file) for file, document in results.items())
