"""What selection costs: every method, and the compressor's kernels."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import percent
from benchmarks.report import NOT_MEASURED, Block, Document, Lines

OTHERS = ("torch", "compiled torch", "EVS selection", "VidCom2 selection")


def methods_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per method: time as a multiple of ``score`` at the same ratio, and kept tokens per frame."""
    rows = [row for row in document["rows"] if not row["fault"]]
    ratios = sorted({row["retention_ratio"] for row in rows}, reverse=True)
    by_key = {(row["method"], row["variant"] or "", row["retention_ratio"]): row for row in rows}
    lines = []
    for method, variant in sorted({key[:2] for key in by_key}, key=lambda name: (name[0] != "score", name)):
        line = [f"{method} {variant}".strip()]
        for ratio in ratios:
            row, base = by_key.get((method, variant, ratio)), by_key.get(("score", "", ratio))
            line.append(f"{row['ms']['median'] / base['ms']['median']:.2f}x" if row and base else "")
        least = by_key.get((method, variant, ratios[-1]))
        lines.append([*line, "{min} / {median:g} / {max}".format(**least["kept_per_frame"]) if least else ""])
    kept = f"kept per frame at {percent(ratios[-1])}, least / median / most"
    return ["method", *[f"time at {percent(ratio)}" for ratio in ratios], kept], lines


def kernels_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per size and dtype: times of others as multiples of ours, and peak memory as a share of the tokens."""
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        cases.setdefault((f"{row['tokens']:,}", row["dtype"]), {})[row["implementation"]] = row
    present = [name for name in OTHERS if any(name in case for case in cases.values())]
    on_gpu = bool(document.get("gpu"))

    def peak(row: dict[str, Any]) -> str:
        return "" if row.get("peak_bytes") is None else f"{100 * row['peak_bytes'] / row['x_bytes']:.0f}%"

    lines = []
    for (tokens, dtype), case in cases.items():
        ours = case["ours"]["ms"]
        times = [f"{ours['median']:.3f} ± {ours['spread']:.3f}"] if on_gpu else []
        ratios = [f"{case[n]['ms']['median'] / ours['median']:.2f}x" if n in case else "" for n in present]
        lines.append([tokens, dtype, *times, *ratios, peak(case["ours"]), peak(case["torch"])])
    header = ["tokens", "dtype", *(["ours, ms"] if on_gpu else []), *[f"{name} / ours" for name in present]]
    return [*header, "peak, ours", "peak, torch"], lines


def kernels_caption(document: Document) -> str:
    """Machine and sizes."""
    arguments = document["arguments"]
    kept = f"{percent(arguments['retention'])} kept, D = {arguments['hidden']}, H = {arguments['width']}"
    threads = "" if document.get("gpu") else f", {document.get('threads')} thread(s)"
    return f"{document['environment']['machine']}{threads}; {kept}; peak memory as a share of the tokens'"


def kernels_whole(results: dict[str, Document], part: Any) -> str:
    """The CPU's and the GPU's results."""
    parts = [part(document, file) for file, document in results.items()] or [NOT_MEASURED]
    if "kernels_gpu.json" not in results:
        parts.append("The Triton kernels have not been timed on a GPU yet.")
    return "\n\n".join(parts)


BLOCKS = {
    "methods": Block(
        pattern="methods_[cg]pu.json",
        rows=methods_rows,
        caption="times `score`'s on {environment[machine]}; T = {video[T]}, N = {video[N]}, D = {video[D]}, "
        "{video[dtype]}, {video[content]}; medians of {repeats}",
    ),
    "kernels": Block(pattern="kernels_[cg]pu.json", rows=kernels_rows, caption=kernels_caption, whole=kernels_whole),
}
