from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from score_vllm import num_retained_tokens
from score_vllm.budget import check_retention_ratio


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [
        (100, 0.29, 29),
        (1000, 0.1, 100),
        (3000, 0.1, 300),
        (42566, 0.1, 4256),
        (42566, 0.25, 10641),
        (42566, 0.4, 17026),
        (10, 0.01, 1),
        (1, 1, 1),
        (7, 1.0, 7),
        (1000, 1e-9, 1),
        (3, Decimal("0.7"), 2),
        (100, Decimal("0.9999999999999999999999999999999"), 99),
        (100, np.float64(0.29), 29),
    ],
)
def test_known_counts(tokens: int, ratio: float, kept: int) -> None:
    assert num_retained_tokens(tokens, ratio) == kept


@given(st.integers(1, 10**7), st.integers(1, 10_000))
def test_is_the_floor_of_the_ratio_as_written(tokens: int, ten_thousandths: int) -> None:
    ratio = ten_thousandths / 10_000
    exact = Fraction(ten_thousandths, 10_000) * tokens
    assert num_retained_tokens(tokens, ratio) == max(1, exact.numerator // exact.denominator)


@given(st.integers(1, 10**6), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_is_monotonic_and_in_range(tokens: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 1 <= num_retained_tokens(tokens, low) <= num_retained_tokens(tokens, high) <= tokens


@pytest.mark.parametrize("bad", [0, -1, 1.01, float("nan"), float("inf"), float("-inf"), 10**400])
def test_values_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"retention_ratio must be a number in \(0, 1\], got"):
        num_retained_tokens(10, bad)


@pytest.mark.parametrize("bad", ["0.5", True, False, None, [0.5], {}, Fraction(1, 3)])
def test_not_a_number(bad: object) -> None:
    with pytest.raises(TypeError, match="my_field must be a number"):
        check_retention_ratio(bad, "my_field")


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_token_counts(bad: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_tokens"):
        num_retained_tokens(bad, 0.5)  # type: ignore[arg-type]
