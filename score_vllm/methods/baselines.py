"""Content-blind baselines: evenly spaced and random tokens."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.coverage import even_tokens
from score_vllm.methods import register
from score_vllm.methods.common import check_number
from score_vllm.types import TokenSelection, VideoGrid


def _selection(x: torch.Tensor, indices: torch.Tensor) -> TokenSelection:
    frames, per_frame, d = x.shape
    scores = torch.zeros(frames * per_frame, dtype=torch.float32, device=x.device)
    indices = indices.to(x.device)
    scores[indices] = 1.0
    return TokenSelection(indices, x.reshape(-1, d)[indices], scores, frames, per_frame)


@register("uniform")
def uniform(x: torch.Tensor, num_retained: int, *, grid: VideoGrid | None = None, **_: Any) -> TokenSelection:
    """Tokens spread evenly over time and space, see :func:`~score_vllm.coverage.even_tokens`.

    Args:
        x: [T, N, D].
        num_retained: K.
        grid: T, rows, columns; None: one row of N columns.

    Returns:
        The selection; scores are 1 for kept tokens and 0 for the rest.
    """
    frames, per_frame = x.shape[:2]
    return _selection(x, even_tokens(grid or VideoGrid(frames, 1, per_frame), num_retained))


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
