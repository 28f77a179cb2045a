"""SCORE: rank tokens by the trained retention policy (paper section 4.5)."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.kernels import ops
from score_vllm.methods import Weights, register
from score_vllm.policy import RetentionPolicy
from score_vllm.types import VideoGrid


@register("score", weights=Weights(RetentionPolicy.from_pretrained, lambda name: name))
def score(
    x: torch.Tensor,
    num_retained: int,
    *,
    policy: RetentionPolicy | None = None,
    grid: VideoGrid | None = None,
    **_: Any,
) -> torch.Tensor:
    """Logits of the policy for every token; infinite for those that it spreads evenly.

    Args:
        x: [T, N, D].
        num_retained: K; read by policies with a ``ranked_share`` below 1.
        policy: the trained policy.
        grid: T, rows, columns; for policies that spread tokens evenly.

    Returns:
        [T * N] float32.

    Raises:
        ValueError: no policy is given, its hidden size is not D, or it spreads tokens and there is no grid.
    """
    if policy is None:
        raise ValueError("method 'score' needs policy=RetentionPolicy(...); pass one or choose another method")
    with torch.no_grad():
        logits = policy(x).flatten()
    if policy.config.ranked_share == 1:
        return logits
    if grid is None:
        raise ValueError("method 'score' needs grid=VideoGrid(T, rows, columns): the policy spreads tokens evenly")
    return ops.keep_always(logits, policy.spread(grid, num_retained))
