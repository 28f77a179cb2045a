"""The policy that a run starts from: fresh, perhaps in standardised inputs, or one that was saved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from score_vllm.kernels.reference import residual
from score_vllm.policy import RetentionPolicy
from score_vllm.train.config import TrainSettings
from score_vllm.train.schema import ConfigurationError

# Of the largest scale: a channel that never moves is not blown up.
_LEAST = 1e-3


class StandardisedPolicy(RetentionPolicy):
    """Learns in ``(x - mean) / scale`` and ``residual / scale``. Not in the paper: features of real encoders have a few
    channels far larger than the rest, which an optimiser with one rate for all weights follows first.

    The first cell's residual is the cell itself, so residuals are scaled and not shifted: that folds exactly into the
    hidden layer. Arguments as of :class:`~score_vllm.policy.RetentionPolicy`.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mean", torch.zeros(self.w_in.shape[1]))
        self.register_buffer("scale", torch.ones(self.w_in.shape[1]))

    @torch.no_grad()
    def measure(self, videos: Iterable[torch.Tensor]) -> None:
        """Take mean and scale from videos, [T, N, D] each, one of them at least."""
        device, d = self.mean.device, self.config.hidden_size
        count, sums = 0, torch.zeros(3, d, dtype=torch.float64, device=device)
        for x in videos:
            tokens, change = x.to(device).flatten(0, 1).double(), residual(x.to(device)).flatten(0, 1).double()
            count += len(tokens)
            sums += torch.stack([tokens.sum(0), tokens.square().sum(0), change.square().sum(0)])
        first, second, changed = sums / count
        scales = [(second - first.square()).clamp(min=0).sqrt(), changed.sqrt()]
        parts = 2 if self.config.use_residual else 1
        self.mean.copy_(torch.cat([first, torch.zeros_like(first)][:parts]))
        self.scale.copy_(torch.cat([s.clamp(min=max(float(s.max()) * _LEAST, 1e-12)) for s in scales][:parts]))

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Folded: the same logits over the tokens as they are. Differentiable."""
        w_in = self.w_in / self.scale
        return w_in, self.b_in - w_in @ self.mean, self.w_out, self.b_out

    @torch.no_grad()
    def plain(self) -> RetentionPolicy:
        """The policy that serves."""
        policy = RetentionPolicy(
            self.config.hidden_size,
            self.config.policy_width,
            use_residual=self.config.use_residual,
            ranked_share=self.config.ranked_share,
        )
        for parameter, folded in zip(
            (policy.w_in, policy.b_in, policy.w_out, policy.b_out), self.weights(), strict=True
        ):
            parameter.copy_(folded)
        policy.config = self.config
        return policy

    def save_pretrained(self, directory: str | os.PathLike[str], **provenance: Any) -> Path:
        """As of the base class: folded weights."""
        return self.plain().save_pretrained(directory, **provenance)


def make_policy(settings: TrainSettings, hidden_size: int, architecture: str) -> RetentionPolicy:
    """The policy to start from: fresh, or that of ``policy.init``.

    Raises:
        ConfigurationError: ``policy.init`` names nothing, is for another width of tokens or another architecture, or
            differs from ``policy.use_residual``.
    """
    wanted = settings.policy
    if not wanted.init:
        return (StandardisedPolicy if wanted.standardise else RetentionPolicy)(
            hidden_size,
            wanted.width or None,
            use_residual=wanted.use_residual,
            initial_keep_probability=wanted.initial_keep_probability,
            model_id=settings.model.path,
            architecture=architecture,
            seed=settings.seed,
            ranked_share=wanted.ranked_share,
        )
    if wanted.standardise:
        raise ConfigurationError(
            f"policy.standardise must be 0 with policy.init, whose weights are for tokens as they are, "
            f"got {wanted.standardise}"
        )
    try:
        policy = RetentionPolicy.from_pretrained(wanted.init)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigurationError(f"policy.init: {error}") from error
    if policy.config.hidden_size != hidden_size:
        raise ConfigurationError(
            f"policy.init {wanted.init!r} is for tokens of width {policy.config.hidden_size}, "
            f"the model's have {hidden_size}"
        )
    if policy.config.architecture not in ("", architecture):
        raise ConfigurationError(
            f"policy.init {wanted.init!r} is for {policy.config.architecture}, the model is a {architecture}"
        )
    policy.config = dataclasses.replace(policy.config, architecture=architecture, ranked_share=wanted.ranked_share)
    if policy.config.use_residual != wanted.use_residual:
        raise ConfigurationError(
            f"policy.use_residual must be {policy.config.use_residual}, as in policy.init, got {wanted.use_residual}"
        )
    return policy
