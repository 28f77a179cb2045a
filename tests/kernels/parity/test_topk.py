"""The top-K kernels against a sort: ties, NaN, every K, several blocks, partial sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from score_vllm.kernels import ops

INF, NAN = float("inf"), float("nan")


def by_sorting(scores: torch.Tensor, k: int) -> list[int]:
    """Python's own stable sort: larger first, NaN as -inf, then the lower index."""
    values = [-INF if value != value else value for value in scores.tolist()]
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def check(scores: torch.Tensor, k: int) -> None:
    indices, has_nan = ops.topk(scores, k)
    assert ops.last_backend("topk") == "triton"
    assert indices.dtype == torch.int64
    assert has_nan.dtype == torch.bool
    assert has_nan.shape == ()
    assert indices.tolist() == by_sorting(scores, k)
    assert bool(has_nan) == bool(scores.isnan().any())


few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, 0.1])
any_value = st.floats(width=32)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_scores_like_a_sort(data, device):
    values = data.draw(st.lists(st.one_of(few_values, any_value), min_size=1, max_size=40))
    # Repeat the drawn values so that they fill several blocks, with ties across blocks.
    length = data.draw(st.integers(1, 2500))
    scores = torch.tensor(values, dtype=torch.float32, device=device).repeat(-(-length // len(values)))[:length]
    check(scores, data.draw(st.integers(1, length)))


KINDS = ["normal", "equal", "two_values", "close", "nan", "zeros", "negative"]
LENGTHS = [1, 2, 1023, 1024, 1025, 2100]


def each_with_each() -> list[Any]:
    """`make check` takes every kind and every length, and leaves the rest of their product to `make test`."""
    return [
        pytest.param(kind, length, marks=[] if length == 1025 or kind == "close" else pytest.mark.slow)
        for kind in KINDS
        for length in LENGTHS
    ]


@pytest.mark.parametrize(("kind", "length"), each_with_each())
def test_shapes_of_score_distributions(kind, length, device, seed):
    scores = {
        "normal": lambda: torch.randn(length),
        "equal": lambda: torch.full((length,), 0.25),
        "two_values": lambda: torch.randint(0, 2, (length,)).float(),
        # Neighbouring floats: the threshold is decided by the last digit.
        "close": lambda: (torch.randint(0, 5, (length,)) + 0x3F800000).to(torch.int32).view(torch.float32),
        "nan": lambda: torch.where(torch.rand(length) < 0.5, NAN, torch.randn(length)),
        "zeros": lambda: torch.where(torch.rand(length) < 0.5, -0.0, 0.0),
        "negative": lambda: -torch.rand(length) - 1,
    }[kind]().to(device)
    middle = int(torch.randint(1, length + 1, ()))
    for k in sorted({1, middle, max(1, length // 10), length}):
        check(scores, k)


def test_more_blocks_than_one_scan_covers(device, seed, monkeypatch):
    from score_vllm.kernels import topk as kernel

    # The prefix over earlier blocks takes several steps, the last one partly empty.
    monkeypatch.setattr(kernel, "SCAN", 4)
    scores = torch.randint(0, 1000, (9 * kernel.BLOCK + 3,), device=device).float()
    for k in (1, 901, 9_000):
        check(scores, k)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_partials_are_summed_in_order(groups, device, seed):
    from score_vllm.kernels import topk as kernel

    partials = torch.randn(groups, 3001, device=device)
    want = partials[0].clone()
    for group in range(1, groups):
        want += partials[group]
    indices, has_nan, scores = kernel.select(partials, 500)
    assert torch.equal(scores, want)
    assert indices.tolist() == by_sorting(want, 500)
    assert not has_nan


def test_scores_that_are_a_slice(device, seed):
    check(torch.randn(9, 1500, device=device)[:, 700], 4)
    check(torch.randn(4000, device=device)[1:3500:3], 100)
