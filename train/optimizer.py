"""The optimiser of a stage and its learning rate."""

from __future__ import annotations

import math

import torch

from score_vllm.policy import RetentionPolicy
from score_vllm.train.config import OptimizerSettings

# Share of the learning rate that a cosine schedule ends with.
LAST_SHARE = 0.05


def learning_rate_factor(number: int, steps: int, settings: OptimizerSettings) -> float:
    """What the learning rate is multiplied with.

    Args:
        number: of the step in its stage, from 0.
        steps: of the stage.
        settings: warm-up and schedule.

    Returns:
        In (0, 1]: linear over the warm-up, then 1 or half a cosine down to :data:`LAST_SHARE`.
    """
    if number < settings.warmup_steps:
        return (number + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (number - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(settings: OptimizerSettings, policy: RetentionPolicy) -> torch.optim.Optimizer:
    """AdamW or SGD over the policy's parameters, in one group."""
    parameters = list(policy.parameters())
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
