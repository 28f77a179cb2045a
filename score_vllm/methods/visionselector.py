"""VisionSelector (repository JulietChoo/VisionSelector): a trained scorer of four tensors, one vector per video."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.methods import Weights, register
from score_vllm.methods.common import block_tokens, rows_at
from score_vllm.methods.visionselector_weights import SelectorWeights
from score_vllm.types import TokenSelection


def importance(x: torch.Tensor, weights: SelectorWeights) -> torch.Tensor:
    """Mean attention logit that each token gets from all tokens, without the N x N matrix.

    The published score of token i is ``mean_j q_i . k_j / sqrt(H)``. A mean of products with ``q_i`` is the product
    with the mean key, so the whole scorer is one vector of D numbers per video.

    Args:
        x: [T, N, D].
        weights: query and key projections, [H, D] and [H] each.

    Returns:
        [T * N] float32.

    Raises:
        ValueError: the weights are of another width.
    """
    if x.shape[-1] != weights.hidden_size:
        raise ValueError(f"the selector reads D={weights.hidden_size}, x is {tuple(x.shape)}")
    flat = x.reshape(-1, x.shape[-1])
    w = weights.to(x.device)
    mean = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    step = block_tokens(x)
    for start in range(0, len(flat), step):
        mean += flat[start : start + step].double().sum(0)
    key = w.k_weight @ (mean / len(flat)).float() + w.k_bias
    direction, shift = w.q_weight.T @ key, w.q_bias @ key
    scores = [flat[start : start + step].float() @ direction for start in range(0, len(flat), step)]
    return (torch.cat(scores) + shift) * key.shape[0] ** -0.5


def _need(weights: SelectorWeights | None) -> SelectorWeights:
    if weights is None:
        raise ValueError(
            "method 'visionselector' needs weights=SelectorWeights(...); see SelectorWeights.from_pretrained"
        )
    return weights


def reference(
    x: torch.Tensor, retention_ratio: float, *, weights: SelectorWeights | None = None, **_: Any
) -> TokenSelection:
    """VisionSelector as published, in fp32 (its code runs in the dtype of the model, where scores tie).

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1).
        weights: the trained scorer.

    Returns:
        The ``max(1, int(rho * T * N))`` tokens of highest score, ascending.

    Raises:
        ValueError: no weights, weights of another width, or all tokens would be kept: there its code fails.
    """
    total = x.shape[0] * x.shape[1]
    count = max(1, int(total * retention_ratio))
    if count == total:
        raise ValueError(
            f"method 'visionselector' in reference mode must keep fewer than T*N={total} tokens: its code fails there"
        )
    scores = importance(x, _need(weights))
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return rows_at(x, order.sort().values, scores)


@register(
    "visionselector",
    reference=reference,
    weights=Weights(
        SelectorWeights.from_pretrained,
        SelectorWeights.wanted,
        ("Qwen2_5_VLForConditionalGeneration",),
    ),
)
def visionselector(
    x: torch.Tensor, num_retained: int, *, weights: SelectorWeights | None = None, **_: Any
) -> torch.Tensor:
    """VisionSelector at exactly K tokens of one video.

    Its published weights were trained on images only, at 64 tokens an image or fewer.

    Args:
        x: [T, N, D].
        num_retained: K.
        weights: the trained scorer.

    Returns:
        [T * N] float32 scores.

    Raises:
        ValueError: no weights, or weights of another width.
    """
    return importance(x, _need(weights))
