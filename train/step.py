"""One video's part of a step: a group of rollouts under the frozen model, and the policy's gradient from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from score_vllm.budget import num_retained_tokens
from score_vllm.policy import RetentionPolicy
from score_vllm.train.config import RolloutSettings
from score_vllm.train.frozen.feature_cache import CachedSample
from score_vllm.train.frozen.model import Engine
from score_vllm.train.objective.loss import bernoulli_entropy, choice_entropy, policy_loss
from score_vllm.train.objective.reward import performance_reward
from score_vllm.train.objective.rollout import draw_ratio, sample_bernoulli, sample_exact

METRICS = (
    "loss",
    "reward",
    "delta_ce",
    "ce",
    "ce_base",
    "ce_gap",
    "sparsity",
    "safe_share",
    "entropy",
    "equal_masks",
    "logit_spread",
    "advantage_spread",
    "ce_spread",
    "choice_entropy",
    "tokens",
)


@dataclass(frozen=True)
class SampleResult:
    """What one video contributes.

    Attributes:
        gradients: of the loss, one per parameter of the policy, float32.
        metrics: [len(METRICS)] float64: loss; reward (mean of eq. 5 + eq. 6); delta_ce (eq. 5); ce; ce_base; ce_gap
            (ce - ce_base); sparsity (eq. 6); safe_share; entropy (of the decisions in nats per token, or of the
            first pick as a share of the largest where budgets are equal); equal_masks (1 where all K are the same, so
            that no gradient is left); logit_spread, advantage_spread and ce_spread (standard deviations);
            choice_entropy (of the first pick as above, whatever the objective); tokens that the language model read in
            the rollouts.
        problem: why the numbers cannot be used, empty if they can.
    """

    gradients: list[torch.Tensor]
    metrics: torch.Tensor
    problem: str = ""


def sample_step(
    policy: RetentionPolicy,
    engine: Engine,
    item: CachedSample,
    settings: RolloutSettings,
    tau: float,
    generator: torch.Generator,
) -> SampleResult:
    """Draw a group, run it, and differentiate the loss (paper section 4.3).

    Args:
        policy: in fp32, on the device to work on.
        engine: the frozen model.
        item: the video.
        settings: objective and group size.
        tau: of eq. 5.
        generator: of this sample's noise.

    Returns:
        Gradients and metrics; gradients are zero where there is a problem.
    """
    encoded = item.encoded
    parameters = list(policy.parameters())
    exact = settings.objective == "budget-matched"
    logits = policy(encoded.x.to(parameters[0].device)).flatten()
    if not bool(torch.isfinite(logits).all()):
        return _problem(parameters, f"{encoded.key}: the policy's logits are not finite: its weights or its inputs are")
    if exact:
        ratio = draw_ratio(settings.ratio_min, settings.ratio_max, generator)
        even = policy.spread(encoded.grid, num_retained_tokens(len(logits), ratio))
        rollouts = sample_exact(logits, settings.group_size, ratio, generator, even)
    else:
        rollouts = sample_bernoulli(logits, settings.group_size, generator)
    kept = rollouts.kept()
    ce = engine.cross_entropy(encoded, kept).to(logits.device)
    if not bool(torch.isfinite(ce).all()) or item.ce_base - item.ce_base != 0:
        return _problem(
            parameters,
            f"{encoded.key}: the frozen model's cross-entropy is not finite (all tokens: {item.ce_base}; rollouts: "
            f"{[round(v, 3) for v in ce.tolist()]}); another model.dtype, or leaving the sample out, may help",
        )
    advantage = rollouts.advantage(ce, item.ce_base, tau)
    loss = policy_loss(rollouts.log_probability(logits), advantage)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    if not bool(torch.isfinite(loss)) or not all(bool(torch.isfinite(g).all()) for g in gradients):
        return _problem(
            parameters,
            f"{encoded.key}: loss {float(loss.detach())} or its gradient is not finite (logits between "
            f"{float(logits.min()):.3g} and {float(logits.max()):.3g})",
        )
    delta = performance_reward(ce, item.ce_base, tau)
    sparse = 1.0 - rollouts.masks.float().mean()
    choice = choice_entropy(logits.detach())
    tokens = sum(k.shape[0] for k in kept) + len(kept) * encoded.num_text_tokens
    values = [
        loss.detach(),
        delta.mean() + sparse,
        delta.mean(),
        ce.mean(),
        item.ce_base,
        ce.mean() - item.ce_base,
        sparse,
        (delta > 0).float().mean(),
        choice if exact else bernoulli_entropy(logits.detach()),
        (rollouts.masks == rollouts.masks[:1]).all(),
        logits.detach().std(correction=0),
        advantage.std(correction=0),
        ce.std(correction=0),
        choice,
        tokens,
    ]
    return SampleResult(list(gradients), torch.tensor([float(v) for v in values], dtype=torch.float64))


def _problem(parameters: list[torch.nn.Parameter], text: str) -> SampleResult:
    nothing = torch.zeros(len(METRICS), dtype=torch.float64)
    return SampleResult([torch.zeros_like(p) for p in parameters], nothing, text)
