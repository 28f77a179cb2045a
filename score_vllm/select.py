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
    *,
    mode: str = "exact",
    variant: str | None = None,
    frame_features: torch.Tensor | None = None,
    **options: Any,
) -> TokenSelection:
    """Keep ``floor(retention_ratio * T * N)`` tokens of one video (paper section 4.5).

    Args:
        x: [T, N, D] visual tokens after the vision tower's merger, bf16, fp16 or fp32.
        retention_ratio: rho in (0, 1]; 1 keeps everything unchanged.
        method: a registered method; see :func:`score_vllm.methods.names`.
        policy: trained weights for ``method="score"``.
        saliency: [T, N] float, higher is more salient: the attention that ``fastvid`` and ``holitom`` rank by.
            Without it they use the L2 norm of ``x``, which is not the published method. Others ignore it.
        mode: ``exact`` keeps exactly that many tokens, in ascending order. ``reference`` does what the peer's
            own code does: its count, its order, its refusals (see :mod:`score_vllm.methods`).
        variant: of the methods that have several: ``vidcom2`` paper, vllm; ``fastvid`` qwen25vl, llavaov, port;
            ``holitom`` and ``dycoke`` official, port. None takes the first.
        frame_features: [T, E] float: a pooled vector of each frame, by which ``fastvid`` cuts the video into
            segments; None uses the mean token. Others ignore it.
        options: options of the method; unknown ones are refused.

    Returns:
        The selection: indices [K], rows [K, D], scores [T * N].

    Raises:
        TypeError: the ratio or an option is not a number.
        ValueError: a shape, ratio, method, mode, variant or option is wrong, or scores are NaN.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be a non-empty [T, N, D] tensor, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be bf16, fp16 or fp32, got {x.dtype}")
    spec = methods.get(method)
    methods.check_mode(spec, mode)
    keep = num_retained_tokens(x.shape[0] * x.shape[1], retention_ratio)
    signals: dict[str, Any] = {
        "policy": policy,
        "saliency": saliency,
        "variant": variant,
        "frame_features": frame_features,
    }
    if mode == "reference":
        assert spec.reference is not None
        methods.check_options(spec, options, mode)
        signals["variant"] = methods.check_variant(spec, variant)
        _check_signals(x, saliency, frame_features)
        with torch.no_grad():
            selection = methods.call(spec.reference, x, float(retention_ratio), signals, options)
        has_nan = selection.scores.isnan().any()
    else:
        selection, has_nan = select_retained(x, keep, method, **signals, **options)
    if bool(has_nan):
        raise ValueError(
            f"method {method!r} gave NaN scores; x or saliency has NaN or infinite values, or the policy is broken"
        )
    return selection


def _check_signals(x: torch.Tensor, saliency: torch.Tensor | None, frame_features: torch.Tensor | None) -> None:
    """Refuse side inputs whose shape or dtype does not fit ``x`` [T, N, D]."""
    frames, per_frame, _ = x.shape
    if saliency is not None and (saliency.shape != (frames, per_frame) or not saliency.is_floating_point()):
        raise ValueError(
            f"saliency must be [T={frames}, N={per_frame}] float, got {tuple(saliency.shape)} {saliency.dtype}"
        )
    if frame_features is not None and (
        frame_features.ndim != 2
        or frame_features.shape[0] != frames
        or frame_features.shape[1] == 0
        or not frame_features.is_floating_point()
    ):
        raise ValueError(
            f"frame_features must be [T={frames}, E >= 1] float, "
            f"got {tuple(frame_features.shape)} {frame_features.dtype}"
        )


def select_retained(
    x: torch.Tensor,
    num_retained: int,
    method: str,
    *,
    policy: RetentionPolicy | None = None,
    saliency: torch.Tensor | None = None,
    frame_features: torch.Tensor | None = None,
    variant: str | None = None,
    **options: Any,
) -> tuple[TokenSelection, torch.Tensor]:
    """:func:`select_tokens` in ``exact`` mode for a caller that holds K already: serving.

    The selecting methods do not sync the host. ``fastvid`` and ``holitom`` do so once, for the segments of
    the video, which shape everything after.

    Args:
        x: [T, N, D].
        num_retained: K in [1, T * N].
        method, policy, saliency, frame_features, variant, options: as in :func:`select_tokens`.

    Returns:
        ``(selection, has_nan)``, the second a 0-dim bool tensor on the device of ``x``.

    Raises:
        TypeError: an option is not a number.
        ValueError: a count, shape, method, variant or option is wrong, or the method broke its contract.
    """
    spec = methods.get(method)
    methods.check_options(spec, options)
    variant = methods.check_variant(spec, variant)
    frames, per_frame, _ = x.shape
    if not 1 <= num_retained <= frames * per_frame:
        raise ValueError(f"num_retained must be in [1, T*N={frames * per_frame}], got {num_retained}")
    _check_signals(x, saliency, frame_features)
    signals = {"policy": policy, "saliency": saliency, "frame_features": frame_features, "variant": variant}
    with torch.no_grad():
        result = methods.call(spec.function, x, num_retained, signals, options)
    if isinstance(result, TokenSelection):
        if result.num_retained != num_retained:
            raise ValueError(f"method {method!r} kept {result.num_retained} tokens, {num_retained} were asked for")
        return result, result.scores.isnan().any()
    indices, has_nan = ops.topk(result, num_retained)
    return TokenSelection(indices, ops.gather(x, indices), result, frames, per_frame), has_nan
