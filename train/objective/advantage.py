"""From the rewards of a group to one advantage per rollout."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def split_advantage(delta_ce: torch.Tensor, sparsity: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """The paper's asymmetric advantage, eq. 7.

    Safe rollouts (``delta_ce > 0``) are ranked among themselves by sparsity; the others are pushed away in
    proportion to their violation and sparsity. The standard deviation is the population's. With fewer than two
    safe rollouts eq. 7 is undefined and the safe advantage is 0.

    Args:
        delta_ce: [K] float32, paper eq. 5.
        sparsity: [K] float32, paper eq. 6.
        epsilon: of the denominator, > 0.

    Returns:
        [K] float32.

    Raises:
        ValueError: the shapes differ or are not [K].
    """
    if delta_ce.ndim != 1 or delta_ce.shape != sparsity.shape:
        raise ValueError(
            f"delta_ce and sparsity must both be [K], got {tuple(delta_ce.shape)} and {tuple(sparsity.shape)}"
        )
    safe = delta_ce > 0
    advantage = delta_ce * sparsity
    if int(safe.sum()) < 2:
        return torch.where(safe, torch.zeros_like(advantage), advantage)
    chosen = sparsity[safe]
    standing = (sparsity - chosen.mean()) / (chosen.std(correction=0) + epsilon)
    return torch.where(safe, delta_ce * standing, advantage)


def group_advantage(ce: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Advantage at a fixed budget: ``(mean CE - CE) / std`` within the group (population std).

    Not the paper's: all rollouts of a group keep the same number of tokens, so only the cross-entropy ranks them.

    Args:
        ce: [K] float32.
        epsilon: of the denominator, > 0.

    Returns:
        [K] float32; all zero where the group is equal or has one member.

    Raises:
        ValueError: ``ce`` is not [K].
    """
    if ce.ndim != 1 or ce.shape[0] < 1:
        raise ValueError(f"ce must be a non-empty [K] tensor, got {tuple(ce.shape)}")
    centred = ce.mean() - ce
    return centred / (ce.std(correction=0) + epsilon)
