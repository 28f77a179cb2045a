"""SCORE: rank tokens by the trained retention policy (paper section 4.5)."""

from __future__ import annotations

import math
from typing import Any

import torch

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
        num_retained: K; read by policies with ``ratio_input`` or a ``ranked_share`` below 1.
        policy: the trained policy.
        grid: T, rows, columns; None: one row of N columns.

    Returns:
        [T * N] float32.

    Raises:
        ValueError: no policy is given, or its hidden size is not D.
    """
    if policy is None:
        raise ValueError("method 'score' needs policy=RetentionPolicy(...); pass one or choose another method")
    with torch.no_grad():
        logits = policy(x, num_retained / (x.shape[0] * x.shape[1])).flatten()
    even = policy.spread(grid or VideoGrid(x.shape[0], 1, x.shape[1]), num_retained)
    # Added, so that NaN stays NaN.
    return logits if even is None else logits.index_add(0, even.to(x.device), logits.new_full(even.shape, math.inf))
