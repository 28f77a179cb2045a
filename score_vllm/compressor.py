"""The one door to every method: score, keep the global top K, gather the rows."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm import methods
from score_vllm.budget import num_retained_tokens
from score_vllm.kernels import ops
from score_vllm.policy import RetentionPolicy
from score_vllm.types import TokenSelection


def select_tokens(
    x: torch.Tensor,
    retention_ratio: float,
    method: str = "score",
    policy: RetentionPolicy | None = None,
    saliency: torch.Tensor | None = None,
    **options: Any,
) -> TokenSelection:
    """Keep ``floor(retention_ratio * T * N)`` tokens of one video (paper section 4.5).

    Args:
        x: [T, N, D] visual tokens after the vision tower's merger, bf16, fp16 or fp32.
        retention_ratio: rho in (0, 1]; 1 keeps everything unchanged.
        method: a registered method; see :func:`score_vllm.methods.names`.
        policy: trained weights for ``method="score"``.
        saliency: [T, N] per-token saliency for the methods that take one.
        options: options of the method; unknown ones are refused.

    Returns:
        The selection: ascending indices [K], rows [K, D], scores [T * N].

    Raises:
        TypeError: the ratio is not a number.
        ValueError: a shape, ratio, method or option is wrong, or scores are NaN.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be a non-empty [T, N, D] tensor, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be bf16, fp16 or fp32, got {x.dtype}")
    keep = num_retained_tokens(x.shape[0] * x.shape[1], retention_ratio)
    selection, has_nan = select_retained(x, keep, method, policy=policy, saliency=saliency, **options)
    if bool(has_nan):
        raise ValueError(f"method {method!r} gave NaN scores; x has NaN or infinite values, or the policy is broken")
    return selection


def select_retained(
    x: torch.Tensor,
    num_retained: int,
    method: str,
    *,
    policy: RetentionPolicy | None = None,
    saliency: torch.Tensor | None = None,
    **options: Any,
) -> tuple[TokenSelection, torch.Tensor]:
    """:func:`select_tokens` for a caller that holds K already, without a host sync: serving.

    Args:
        x: [T, N, D].
        num_retained: K in [1, T * N].
        method, policy, saliency, options: as in :func:`select_tokens`.

    Returns:
        ``(selection, has_nan)``, the second a 0-dim bool tensor on the device of ``x``.

    Raises:
        ValueError: a shape, method or option is wrong, or the method broke its contract.
    """
    spec = methods.get(method)
    methods.check_options(spec, options)
    frames, per_frame, _ = x.shape
    if saliency is not None and saliency.shape != (frames, per_frame):
        raise ValueError(f"saliency must be [T={frames}, N={per_frame}], got {tuple(saliency.shape)}")
    result = spec.function(x, num_retained, policy=policy, saliency=saliency, **options)
    if isinstance(result, TokenSelection):
        if result.num_retained != num_retained:
            raise ValueError(f"method {method!r} kept {result.num_retained} tokens, {num_retained} were asked for")
        return result, torch.zeros((), dtype=torch.bool, device=x.device)
    indices, has_nan = ops.topk(result, num_retained)
    return TokenSelection(indices, ops.gather(x, indices), result, frames, per_frame), has_nan
