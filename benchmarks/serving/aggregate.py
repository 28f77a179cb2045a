"""From records of requests to the numbers of a load test. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 and mean in milliseconds; None of nothing."""
    if not seconds:
        return None
    named = {f"p{q}": float(np.percentile(seconds, q)) * 1000 for q in (50, 95, 99)}
    return {**named, "mean": sum(seconds) / len(seconds) * 1000}


def aggregate(records: Sequence[dict[str, Any]], expected: int) -> dict[str, Any]:
    """One row of the results.

    Throughput counts what succeeded, from the first request sent to the last answer. A request that left no record is
    a failure too. Latencies are of successful requests. ``tpot`` is a request's mean gap after its first token.

    Args:
        records: times in seconds.
        expected: requests that were to be sent.

    Raises:
        ValueError: no record at all, or more than expected.
    """
    if not records or len(records) > expected:
        raise ValueError(f"expected 1 to {expected} records, got {len(records)}")
    good = [record for record in records if record["error"] is None]
    seconds = max(record["end"] for record in records) - min(record["sent"] for record in records)
    return {
        "requests": expected,
        "failures": expected - len(good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": sum(record["completion_tokens"] for record in good) / seconds,
        "prompt_tokens": sum(record["prompt_tokens"] for record in good),
        "ttft_ms": _spread([record["ttft"] for record in good]),
        "itl_ms": _spread([gap for record in good for gap in record["itl"]]),
        "tpot_ms": _spread([sum(record["itl"]) / len(record["itl"]) for record in good if record["itl"]]),
        "e2e_ms": _spread([record["end"] - record["sent"] for record in good]),
    }


def by_ratio(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """TTFT and ITL of each retention ratio in a mixed run; keys are the ratios as text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["error"] is None:
            groups.setdefault(str(record["retention_ratio"]), []).append(record)
    return {
        name: {
            "requests": len(group),
            "ttft_ms": _spread([record["ttft"] for record in group]),
            "itl_ms": _spread([gap for record in group for gap in record["itl"]]),
        }
        for name, group in sorted(groups.items())
    }


def verdicts(rows: Sequence[dict[str, Any]], concurrencies: Sequence[int]) -> list[str]:
    """The goals in words, each with its numbers: no failures, throughput above vanilla, decode not slower.

    A row is compared with vanilla's at the same concurrency. Decode speed is the median inter-token latency, as a
    reader of the stream sees it: under load most gaps hold another request's prefill.

    Args:
        rows: of :func:`aggregate`, with ``config``, ``retention_ratios`` and ``concurrency``.
        concurrencies: those that the goals are about.
    """
    failures = sum(row["failures"] for row in rows)
    lines = [f"failed requests: {failures} ({'met' if failures == 0 else 'NOT MET'}: must be 0)"]
    vanilla = {row["concurrency"]: row for row in rows if row["config"] == "vanilla"}
    for row in rows:
        base = vanilla.get(row["concurrency"])
        if row["config"] == "vanilla" or base is None or row["concurrency"] not in concurrencies:
            continue
        if max(row["retention_ratios"]) >= 1 or row["itl_ms"] is None or base["itl_ms"] is None:
            continue
        faster = row["requests_per_second"] / base["requests_per_second"]
        decode = row["itl_ms"]["p50"] / base["itl_ms"]["p50"]
        where = f"{row['config']} at concurrency {row['concurrency']}"
        lines.append(f"{where}: throughput {faster:.2f}x vanilla ({'met' if faster > 1 else 'NOT MET'})")
        verdict = "met" if decode <= 1 else "NOT MET"
        lines.append(f"{where}: median gap between tokens {decode:.2f}x vanilla ({verdict})")
    return lines
