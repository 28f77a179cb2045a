"""The accuracy and sparsity reward of a group of rollouts (paper eq. 5 and 6)."""

from __future__ import annotations

import math

import torch


def performance_reward(ce: torch.Tensor, ce_base: float, tau: float) -> torch.Tensor:
    """How far each rollout stays below the tolerated cross-entropy, paper eq. 5: ``tau * CE_base - CE``.

    Args:
        ce: [K] float32, mean cross-entropy of the target under each rollout, nats per token.
        ce_base: the same under all tokens.
        tau: tolerance, >= 1.

    Returns:
        [K] float32; above zero is the safe zone.

    Raises:
        ValueError: a shape or a range is wrong.
    """
    if ce.ndim != 1 or ce.shape[0] < 1:
        raise ValueError(f"ce must be a non-empty [K] tensor, got {tuple(ce.shape)}")
    if not math.isfinite(tau) or tau < 1:
        raise ValueError(f"tau must be a finite number >= 1, got {tau!r}")
    return tau * ce_base - ce.float()


def sparsity(masks: torch.Tensor) -> torch.Tensor:
    """Share of dropped tokens of each rollout, paper eq. 6.

    Args:
        masks: [K, T * N] bool, True where a token is kept.

    Returns:
        [K] float32 in [0, 1].

    Raises:
        ValueError: ``masks`` is not a non-empty [K, T * N] bool tensor.
    """
    if masks.ndim != 2 or 0 in masks.shape or masks.dtype != torch.bool:
        raise ValueError(f"masks must be non-empty [K, T * N] bool, got {tuple(masks.shape)} {masks.dtype}")
    return 1.0 - masks.float().mean(dim=1)
