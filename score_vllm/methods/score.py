"""SCORE: rank tokens by the trained retention policy (paper section 4.5)."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.methods import Weights, register
from score_vllm.policy import RetentionPolicy


@register("score", weights=Weights(RetentionPolicy.from_pretrained, lambda name: name))
def score(x: torch.Tensor, num_retained: int, *, policy: RetentionPolicy | None = None, **_: Any) -> torch.Tensor:
    """Logits of the policy for every token.

    Args:
        x: [T, N, D].
        num_retained: K; read by policies with ``ratio_input`` alone.
        policy: the trained policy.

    Returns:
        [T * N] float32.

    Raises:
        ValueError: no policy is given, or its hidden size is not D.
    """
    if policy is None:
        raise ValueError("method 'score' needs policy=RetentionPolicy(...); pass one or choose another method")
    with torch.no_grad():
        return policy(x, num_retained / (x.shape[0] * x.shape[1])).flatten()
