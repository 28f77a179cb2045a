"""Content-blind baselines: evenly spaced and random tokens."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.methods import register
from score_vllm.methods.common import check_number
from score_vllm.types import TokenSelection, VideoGrid

# Of 2^32: 1 / p and 1 / p^2 of the plastic number p = 1.3247 for rows and columns, the golden section for cells.
LATTICE = (3242174889, 2447445413, 2654435769)


def _selection(x: torch.Tensor, indices: torch.Tensor) -> TokenSelection:
    frames, per_frame, d = x.shape
    scores = torch.zeros(frames * per_frame, dtype=torch.float32, device=x.device)
    indices = indices.to(x.device)
    scores[indices] = 1.0
    return TokenSelection(indices, x.reshape(-1, d)[indices], scores, frames, per_frame)


@register("uniform")
def uniform(x: torch.Tensor, num_retained: int, *, grid: VideoGrid | None = None, **_: Any) -> TokenSelection:
    """Tokens spread evenly over time and space: cells keep equally many, to one token, each of them a part of a lattice
    (Kronecker's, with the 2-D plastic number) that shifts from cell to cell, so that no row or column is preferred.

    Args:
        x: [T, N, D].
        num_retained: K.
        grid: T, rows, columns; None: one row of N columns.

    Returns:
        The selection; scores are 1 for kept tokens and 0 for the rest.
    """
    frames, per_frame = x.shape[:2]
    places = torch.arange(per_frame)
    columns = per_frame if grid is None else grid.w
    # Fractions of 2^32 in whole numbers: the same order on every device.
    key = places // columns * LATTICE[0] + places % columns * LATTICE[1]
    key = (key + torch.arange(frames)[:, None] * LATTICE[2]) % 2**32
    rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    bounds = (2 * torch.arange(frames + 1) * num_retained + frames) // (2 * frames)
    dropped = (rank >= bounds.diff()[:, None]).flatten()
    return _selection(x, dropped.byte().argsort(stable=True)[:num_retained])


@register("random")
def random(x: torch.Tensor, num_retained: int, *, seed: int = 0, **_: Any) -> TokenSelection:
    """K tokens drawn without replacement; the same draw for the same seed and size on every device.

    Args:
        x: [T, N, D].
        num_retained: K.
        seed: of the draw.

    Returns:
        The selection; scores are 1 for kept tokens and 0 for the rest.
    """
    check_number("random", "seed", seed, -(2**63), 2**63 - 1, whole=True)
    total = x.shape[0] * x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(total, generator=generator)[:num_retained]
    return _selection(x, drawn.sort().values)
