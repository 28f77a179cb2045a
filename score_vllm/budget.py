"""How many tokens survive. The only place a retained count is computed."""

from __future__ import annotations

import math
import numbers
from decimal import Decimal
from fractions import Fraction
from reprlib import repr as brief
from typing import Any

RATIO_RANGE = "a number in (0, 1]"


def check_retention_ratio(value: Any, field: str = "retention_ratio") -> float:
    """Validate one retention ratio.

    Args:
        value: the kept fraction, rho of the paper (section 4.1). ``int``, ``float``, ``Decimal`` or a
            numpy scalar; not a bool, not a string.
        field: name used in the error message.

    Returns:
        The ratio as a float in (0, 1].

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is NaN, infinite or outside (0, 1].
    """
    # A fraction such as 1/3 has no decimal form to be read "as written".
    if isinstance(value, (bool, Fraction)) or not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{field} must be {RATIO_RANGE}, got {brief(value)} ({type(value).__name__})")
    try:
        ratio = float(value)
    except OverflowError:
        raise ValueError(f"{field} must be {RATIO_RANGE}, got an integer beyond any float") from None
    if not math.isfinite(ratio) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"{field} must be {RATIO_RANGE}, got {brief(value)}")
    return ratio


def num_retained_tokens(num_tokens: int, retention_ratio: float) -> int:
    """K = max(1, floor(rho * num_tokens)), in exact decimal arithmetic of the ratio as written.

    Paper section 4.5 keeps ``floor(rho * T * N)``. A binary product would make 0.29 of 100 tokens 28;
    here the ratio is read as its shortest decimal form, so it is 29.

    Args:
        num_tokens: T * N, the number of visual tokens, at least 1.
        retention_ratio: rho in (0, 1].

    Returns:
        The number of tokens to keep, in [1, num_tokens].

    Raises:
        TypeError: an argument is not a number of the right kind.
        ValueError: ``num_tokens`` < 1, or the ratio is outside (0, 1].
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, numbers.Integral):
        raise TypeError(f"num_tokens must be an integer >= 1, got {num_tokens!r}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be >= 1, got {num_tokens}")
    check_retention_ratio(retention_ratio)
    # str() of a float is its shortest round-trip decimal: the ratio as its author wrote it.
    return max(1, math.floor(Fraction(str(retention_ratio)) * int(num_tokens)))
