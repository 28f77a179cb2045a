"""Policy-gradient losses: log-probabilities of sampled masks or orders, weighted by their advantages."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOGIT_LIMIT = 10.0


def bernoulli_log_probability(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``log pi(m | h)``, paper eq. 9 and the bracket of eq. 8.

    Logits are clamped to +-10 here and nowhere else, so that no log-probability is infinite.

    Args:
        logits: [T * N] float32, differentiable.
        masks: [K, T * N] bool.

    Returns:
        [K] float32, normalised by T * N.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 1 or masks.ndim != 2 or masks.shape[1] != logits.shape[0] or masks.dtype != torch.bool:
        raise ValueError(
            f"logits must be [T * N] and masks [K, T * N] bool, got {tuple(logits.shape)}, "
            f"{tuple(masks.shape)} {masks.dtype}"
        )
    limited = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    # m log p + (1 - m) log(1 - p) = m * logit + log(1 - p): one product of masks and logits for the group.
    return (masks.float() @ limited + F.logsigmoid(-limited).sum()) / logits.shape[0]


def plackett_luce_log_probability(logits: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Mean over picks of the log-probability of drawing tokens in this order without replacement.

    Under Plackett-Luce the j-th pick has probability ``exp(l_j) / sum of exp(l) over what is left``; this is the
    law of Gumbel top-k (Kool et al. 2019, arXiv 1903.06059).

    Args:
        logits: [T * N] float32, differentiable; clamped to +-10 as above.
        orders: [K, k] int64, distinct flat indices, first pick first.

    Returns:
        [K] float32, normalised by k.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 1 or orders.ndim != 2 or not 1 <= orders.shape[1] <= logits.shape[0]:
        raise ValueError(
            f"logits must be [T * N] and orders [K, k] with 1 <= k <= T * N, got {tuple(logits.shape)} "
            f"and {tuple(orders.shape)}"
        )
    limited = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    picked = limited[orders]  # [K, k]
    last_first = picked.flip(1)
    if orders.shape[1] < logits.shape[0]:
        never = torch.ones(orders.shape[0], logits.shape[0], dtype=torch.bool, device=logits.device)
        never.scatter_(1, orders, False)
        rest = torch.logsumexp(limited.expand_as(never).masked_fill(~never, float("-inf")), dim=1, keepdim=True)
        left = torch.logcumsumexp(torch.cat([rest, last_first], dim=1), dim=1)[:, 1:]
    else:
        left = torch.logcumsumexp(last_first, dim=1)
    return (last_first - left).mean(dim=1)


def policy_loss(log_probability: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Paper eq. 8: ``-(1/K) sum of A * (normalised log-probability)``.

    Args:
        log_probability: [K] float32, differentiable.
        advantage: [K] float32; no gradient flows through it.

    Returns:
        0-dim float32.

    Raises:
        ValueError: the shapes differ or are not [K].
    """
    if log_probability.ndim != 1 or log_probability.shape != advantage.shape:
        raise ValueError(
            f"log_probability and advantage must both be [K], got {tuple(log_probability.shape)} "
            f"and {tuple(advantage.shape)}"
        )
    return -(advantage.detach() * log_probability).mean()


def bernoulli_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the keep-or-drop decisions, nats per token in [0, log 2].

    Args:
        logits: [T * N] float32.

    Returns:
        0-dim float32.
    """
    p = torch.sigmoid(logits)
    return (F.softplus(logits) - p * logits).mean()


def choice_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the first pick over all tokens, as a share of the largest possible: 1 is a blind choice.

    Args:
        logits: [T * N] float32.

    Returns:
        0-dim float32 in [0, 1]; 0 for a single token.
    """
    if logits.shape[0] == 1:
        return logits.new_zeros(())
    log_p = torch.log_softmax(logits, dim=0)
    return -(log_p.exp() * log_p).sum() / torch.log(torch.tensor(float(logits.shape[0]), device=logits.device))
