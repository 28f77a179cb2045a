"""What :mod:`argparse` makes of the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from score_vllm.budget import check_retention_ratio
from score_vllm.config import MAX_CELL_CACHE_GIB, check_cell_cache_gib


def retention_ratio(text: str) -> float:
    """A number in (0, 1]."""
    try:
        return check_retention_ratio(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}") from None


def cell_cache_gib(text: str) -> float:
    """The value of ``--cell-cache-gib``."""
    try:
        return check_cell_cache_gib(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in [0, {MAX_CELL_CACHE_GIB}], got {text!r}") from None


def at_least(least: int) -> Callable[[str], int]:
    """Reads an integer >= ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
        return int(text)

    return read
