"""Speed in one row per ratio, from three benchmarks, for the first page."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import percent, row_name, table
from benchmarks.report import NOT_MEASURED, Block, Document, link

RATIOS = (0.4, 0.25, 0.1)
FILES = "prefill_latency_tiny.json", "ttft_stages_bench.json", "load_bench.json"
USERS = 16


def whole(results: dict[str, Document], _: Any) -> str:
    """How many times faster than vanilla vLLM."""
    if not set(FILES) <= set(results):
        return NOT_MEASURED
    prefill, ttft, load = (results[name]["rows"] for name in FILES)
    rate = {row["config"]: row["requests_per_second"] for row in load if row["concurrency"] == USERS}
    first = {row["row"]: row["ttft_ms"]["median"] for row in ttft}
    rows = {row["row"]: row for row in prefill if row["engine"] == "vllm"}
    lines = []
    for ratio in RATIOS:
        name = row_name(ratio)
        factors = [rows[name]["speedup"], rows[name]["flop_bound"]]
        factors += [first["vanilla"] / first[name], rate[name] / rate["vanilla"]]
        lines.append([percent(ratio), *[f"{factor:.1f}x" for factor in factors]])
    header = ["kept", "prefill", "its FLOP bound", "time to first token", f"requests/s, {USERS} users"]
    machines = " and ".join(dict.fromkeys(results[name]["environment"]["machine"] for name in FILES))
    return f"{table(header, lines)}\n\n({machines}; {', '.join(map(link, FILES))})"


BLOCKS = {
    "speed_summary": Block(pattern="*.json", rows=lambda _: ([], []), caption="", whole=whole),
}
