"""Drawing groups of rollouts, and cutting them into micro-batches that fit a token budget.

Noise depends on (seed, stage, position in the data) alone, never on the process that draws it or on the device,
so that the same training run results however its samples are spread over processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from score_vllm.budget import num_retained_tokens
from score_vllm.train.objective.advantage import group_advantage, split_advantage
from score_vllm.train.objective.loss import bernoulli_log_probability, plackett_luce_log_probability
from score_vllm.train.objective.reward import performance_reward, sparsity


@dataclass(frozen=True)
class Rollouts:
    """K sampled selections of one video.

    Attributes:
        masks: [K, T * N] bool, True where a token is kept.
        orders: [K, k] int64 in the order of drawing for exact-k rollouts; None for independent decisions.
        drawn_from: [C] int64, flat indices that ``orders`` counts in; None: all tokens.
    """

    masks: torch.Tensor
    orders: torch.Tensor | None = None
    drawn_from: torch.Tensor | None = None

    def kept(self) -> list[torch.Tensor]:
        """K ascending int64 index tensors on the CPU; one may be empty."""
        return [mask.nonzero().squeeze(1) for mask in self.masks.cpu()]

    def log_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """[K] float32, differentiable in ``logits`` [T * N]; see :mod:`score_vllm.train.objective.loss`."""
        if self.orders is None:
            return bernoulli_log_probability(logits, self.masks)
        return plackett_luce_log_probability(
            logits if self.drawn_from is None else logits[self.drawn_from], self.orders
        )

    def advantage(self, ce: torch.Tensor, ce_base: float, tau: float) -> torch.Tensor:
        """[K] float32 from ``ce`` [K]: the paper's (eq. 5-7), or the group's own where budgets are equal."""
        if self.orders is None:
            return split_advantage(performance_reward(ce, ce_base, tau), sparsity(self.masks))
        return group_advantage(ce)


def noise_generator(seed: int, stage: str, slot: int) -> torch.Generator:
    """The source of all noise of one training sample.

    Args:
        seed: of the run.
        stage: its name.
        slot: number of the sample in the stage's data, counted over all processes.

    Returns:
        A CPU generator.
    """
    digest = hashlib.sha256(f"{seed}:{stage}:{slot}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_bernoulli(logits: torch.Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
    """K independent masks with ``m ~ Bernoulli(sigmoid(logit))``, paper section 4.3.

    Args:
        logits: [T * N] float32.
        group_size: K.
        generator: on the CPU.

    Returns:
        The rollouts, on the device of ``logits``.
    """
    noise = torch.rand(group_size, logits.shape[0], generator=generator).to(logits.device)
    return Rollouts(noise < torch.sigmoid(logits.detach()))


def draw_ratio(low: float, high: float, generator: torch.Generator) -> float:
    """A retention ratio, log-uniform in [low, high]; one number of ``generator`` is used.

    Raises:
        ValueError: not 0 < low <= high <= 1.
    """
    if not 0 < low <= high <= 1:
        raise ValueError(f"ratios must be 0 < low <= high <= 1, got {low!r} and {high!r}")
    position = float(torch.rand((), generator=generator, dtype=torch.float64))
    return min(high, max(low, math.exp(math.log(low) + position * (math.log(high) - math.log(low)))))


def sample_exact(
    logits: torch.Tensor, group_size: int, ratio: float, generator: torch.Generator, even: torch.Tensor | None = None
) -> Rollouts:
    """K subsets of exactly k = floor(ratio * T * N) tokens, by Gumbel top-k: what serving keeps, with noise.

    Args:
        logits: [T * N] float32.
        group_size: K.
        ratio: retention ratio in (0, 1].
        generator: on the CPU.
        even: [E < k] int64 flat indices that every subset has; only the others are drawn. None: none.

    Returns:
        The rollouts, on the device of ``logits``.
    """
    total = logits.shape[0]
    uniform = torch.rand(group_size, total, generator=generator, dtype=torch.float64)
    # -log(-log(u)) with u kept inside (0, 1).
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1.0 - 1e-16)))
    perturbed = logits.detach().double() + gumbel.to(logits.device)
    keep = num_retained_tokens(total, ratio)
    masks = torch.zeros(group_size, total, dtype=torch.bool, device=logits.device)
    if even is None:
        orders = perturbed.topk(keep, dim=1).indices
        return Rollouts(masks.scatter_(1, orders, True), orders)
    masks[:, even] = True
    others = (~masks[0]).nonzero().squeeze(1)
    orders = perturbed[:, others].topk(keep - len(even), dim=1).indices
    return Rollouts(masks.scatter_(1, others[orders], True), orders, others)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences of like length so that no padded batch exceeds a token budget.

    Args:
        lengths: of the sequences, each >= 1.
        max_tokens: largest rows * longest of a batch; a sequence longer than this runs alone.

    Returns:
        Lists of indices into ``lengths``, longest sequences first; together every index once.

    Raises:
        ValueError: ``max_tokens`` < 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_rollout_tokens must be >= 1, got {max_tokens}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
