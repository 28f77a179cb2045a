"""Tokens spread evenly over a video, whatever they show."""

from __future__ import annotations

import functools

import numpy as np
import torch

from score_vllm.types import VideoGrid

# Of 2^32: 1 / p and 1 / p^2 of the plastic number p = 1.3247 for rows and columns, the golden section for cells.
LATTICE = (3242174889, 2447445413, 2654435769)


def even_tokens(grid: VideoGrid, count: int) -> torch.Tensor:
    """Tokens spread evenly over time and space: cells keep equally many, to one token, each of them a part of a lattice
    (Kronecker's, with the 2-D plastic number) that shifts from cell to cell, so that no row or column is preferred.

    Args:
        grid: T, rows, columns.
        count: number of tokens, in [0, T * N].

    Returns:
        [count] int64 flat indices, ascending, on the CPU; shared between calls, not to be written.
    """
    return torch.from_numpy(_even(grid, count))


# Arrays, not tensors: what is made while torch traces or fakes must not be handed out later.
@functools.lru_cache(maxsize=64)
def _even(grid: VideoGrid, count: int) -> np.ndarray:
    places = np.arange(grid.tokens_per_frame, dtype=np.int64)
    # Fractions of 2^32 in whole numbers: the same order on every machine.
    key = places // grid.w * LATTICE[0] + places % grid.w * LATTICE[1]
    key = (key + np.arange(grid.t, dtype=np.int64)[:, None] * LATTICE[2]) % 2**32
    rank = key.argsort(axis=1, kind="stable").argsort(axis=1)
    bounds = (2 * np.arange(grid.t + 1) * count + grid.t) // (2 * grid.t)
    return np.flatnonzero(rank < np.diff(bounds)[:, None])
