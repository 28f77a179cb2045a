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
