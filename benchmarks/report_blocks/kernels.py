"""The compressor's kernels: against plain torch, in time and memory."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link

OURS = "ours"
OTHERS = ("torch", "compiled torch", "EVS selection", "VidCom2 selection")


def part(document: dict[str, Any], file: str) -> str:
    """One line per size and dtype: times of others as multiples of ours, and peak memory as a share of the tokens."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        cases.setdefault((f"{row['tokens']:,}", row["dtype"]), {})[row["implementation"]] = row
    present = [name for name in OTHERS if any(name in case for case in cases.values())]
    on_gpu = bool(document.get("gpu"))

    def peak(row: dict[str, Any]) -> str:
        return "" if row.get("peak_bytes") is None else f"{100 * row['peak_bytes'] / row['x_bytes']:.0f}%"

    header = ["tokens", "dtype", *(["ours, ms"] if on_gpu else []), *[f"{name} / ours" for name in present]]
    lines = []
    for (tokens, dtype), case in cases.items():
        ours = case[OURS]["ms"]
        times = [f"{ours['median']:.3f} ± {ours['spread']:.3f}"] if on_gpu else []
        ratios = [f"{case[n]['ms']['median'] / ours['median']:.2f}x" if n in case else "" for n in present]
        lines.append([tokens, dtype, *times, *ratios, peak(case[OURS]), peak(case["torch"])])
    body = table([*header, "peak, ours", "peak, torch"], lines)
    arguments = document["arguments"]
    kept = f"{100 * arguments['retention']:g}% kept, D = {arguments['hidden']}, H = {arguments['width']}"
    threads = "" if on_gpu else f", {document.get('threads')} thread(s)"
    machine = document["environment"]["machine"]
    return f"{body}\n\n({machine}{threads}; {kept}; peak memory as a share of the tokens'; {link(file)})"


@block("kernels", "kernels_[cg]pu.json")
def kernels(results: dict[str, Any]) -> str:
    """Markdown of the CPU's and the GPU's results."""
    parts = [part(document, file) for file, document in results.items()]
    if "kernels_gpu.json" not in results:
        parts.append("The Triton kernels have not been timed on a GPU yet.")
    return "\n\n".join(parts)
