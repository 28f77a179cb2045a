"""The two tables of the first page: accuracy of what is served, and speed in one row per ratio."""

from __future__ import annotations

from typing import Any

from harness import table

from report_blocks import block, link
from report_blocks.accuracy import accuracy_table, all_tokens

# Ablations and the training variant stay on the benchmarks page.
SERVED = ("score", "evs", "vidcom2", "holitom", "fastvid", "dycoke", "uniform", "random")
RATIOS = (0.4, 0.25, 0.1)
PREFILL, TTFT, LOAD = "prefill_latency_tiny.json", "ttft_stages_bench.json", "load_bench.json"
USERS = 16


@block("accuracy_summary", "accuracy_world.json")
def accuracy_summary(results: dict[str, Any]) -> str:
    """Markdown of the served methods' rows, in the order of ``SERVED``."""
    ((file, document),) = results.items()
    rows = sorted((row for row in document["rows"] if row["method"] in SERVED), key=lambda r: SERVED.index(r["method"]))
    about = f"{document['questions']} held-out questions about {document['clips']} clips"
    caption = f"({all_tokens(document)}; {about}; {link(file)})"
    return f"{accuracy_table(rows)}\n\n{caption}"


@block("speed_summary", "*.json")
def speed_summary(results: dict[str, Any]) -> str:
    """Markdown of one row per ratio: how many times faster than vanilla vLLM."""
    prefill, ttft, load = (results[name]["rows"] for name in (PREFILL, TTFT, LOAD))
    at_load = {row["config"]: row["requests_per_second"] for row in load if row["concurrency"] == USERS}
    first = {row["row"]: row["ttft_ms"]["median"] for row in ttft}
    lines = []
    for ratio in RATIOS:
        name = f"SCORE {ratio:.0%}"
        row = next(row for row in prefill if row["engine"] == "vllm" and row["row"] == name)
        lines.append(
            [
                f"{ratio:.0%}",
                f"{row['speedup']:.1f}x",
                f"{row['flop_bound']:.1f}x",
                f"{first['vanilla'] / first[name]:.1f}x",
                f"{at_load[name] / at_load['vanilla']:.1f}x",
            ]
        )
    header = ["kept", "prefill", "its FLOP bound", "time to first token", f"requests/s, {USERS} users"]
    names = (PREFILL, TTFT, LOAD)
    machines = " and ".join(dict.fromkeys(results[name]["environment"]["machine"] for name in names))
    return f"{table(header, lines)}\n\n({machines}; {', '.join(map(link, names))})"
