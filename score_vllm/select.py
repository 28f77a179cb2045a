"""Every method through one function: score, keep the global top K, gather the rows."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm import methods
from score_vllm.budget import num_retained_tokens
from score_vllm.kernels import ops
from score_vllm.policy import RetentionPolicy
from score_vllm.types import TokenSelection, VideoGrid

# Signals that are tensors.
_TENSORS = ("saliency", "frame_features", "seconds", "text_before", "text_after")


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
    weights: methods.Learned | None = None,
    grid: VideoGrid | None = None,
    seconds: torch.Tensor | None = None,
    text_before: torch.Tensor | None = None,
    text_after: torch.Tensor | None = None,
    **options: Any,
) -> TokenSelection:
    """Keep ``floor(retention_ratio * T * N)`` tokens of one video (paper section 4.5).

    A method reads those of the arguments below that it names and ignores the others.

    Args:
        x: [T, N, D] visual tokens after the vision tower's merger, bf16, fp16 or fp32.
        retention_ratio: rho in (0, 1]; 1 keeps everything unchanged.
        method: a registered method; see :func:`score_vllm.methods.names`.
        policy: trained weights for ``method="score"``.
        saliency: [T, N] float, higher is more salient: the attention that a method ranks by, of the kind that
            ``methods.get(method).saliency`` names. Without it such methods use the L2 norm of ``x``, which is not the
            published method.
        mode: ``exact`` keeps exactly that many tokens, in ascending order. ``reference`` does what the published
            code does: its count, its order, its refusals (see :mod:`score_vllm.methods`).
        variant: of the methods that have several, out of ``methods.get(method).variants``; None takes the first.
        frame_features: [T, E] float: a pooled vector of each frame, by which ``fastvid`` cuts the video into
            segments; None uses the mean token.
        weights: trained weights of a learned method other than ``score``.
        grid: T, rows and columns of the tokens.
        seconds: [T] float: time of each cell on the source's clock.
        text_before: [B, D] embeddings of the prompt before the video.
        text_after: [A, D] embeddings of the prompt after it.
        options: options of the method; unknown ones are refused.

    Returns:
        The selection: indices [K], rows [K, D], scores [T * N].

    Raises:
        TypeError: the ratio or an option is not a number, or a side input is of another type.
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
        "weights": weights,
        "saliency": saliency,
        "variant": variant,
        "frame_features": frame_features,
        "grid": grid,
        "seconds": seconds,
        "text_before": text_before,
        "text_after": text_after,
    }
    if mode == "reference":
        assert spec.reference is not None
        methods.check_options(spec, options, mode)
        signals["variant"] = methods.check_variant(spec, variant)
        _check_signals(x, signals)
        with torch.no_grad():
            selection = methods.call(spec.reference, x, float(retention_ratio), signals, options)
        has_nan = selection.scores.isnan().any()
    else:
        selection, has_nan = select_retained(x, keep, method, **signals, **options)
    if bool(has_nan):
        raise ValueError(
            f"method {method!r} gave NaN scores; x or saliency has NaN or infinite values, or the weights are broken"
        )
    return selection


def _check_signals(x: torch.Tensor, signals: dict[str, Any]) -> None:
    """Refuse side inputs whose type, shape or dtype does not fit ``x`` [T, N, D]."""
    frames, per_frame, d = x.shape
    for name, kind in (
        *((name, torch.Tensor) for name in _TENSORS),
        ("grid", VideoGrid),
        ("policy", RetentionPolicy),
        ("weights", methods.Learned),
    ):
        given = signals.get(name)
        if not isinstance(given, kind | None):
            raise TypeError(f"{name} must be a {kind.__name__} or None, got {type(given).__name__}")
    shapes: dict[str, tuple[str, int | None, int | None]] = {
        # what is said, rows, columns; None: any number above 0
        "saliency": (f"[T={frames}, N={per_frame}]", frames, per_frame),
        "frame_features": (f"[T={frames}, E >= 1]", frames, None),
        "text_before": (f"[B >= 1, D={d}]", None, d),
        "text_after": (f"[A >= 1, D={d}]", None, d),
    }
    for name, (said, rows, columns) in shapes.items():
        given = signals.get(name)
        if given is not None and (
            given.ndim != 2
            or 0 in given.shape
            or (rows is not None and given.shape[0] != rows)
            or (columns is not None and given.shape[1] != columns)
            or not given.is_floating_point()
        ):
            raise ValueError(f"{name} must be {said} float, got {tuple(given.shape)} {given.dtype}")
    grid, seconds = signals.get("grid"), signals.get("seconds")
    if grid is not None and (grid.t, grid.tokens_per_frame) != (frames, per_frame):
        raise ValueError(f"grid must have T={frames} cells of N={per_frame} tokens, got {grid}")
    if seconds is not None and seconds.shape != (frames,):
        raise ValueError(f"seconds must be [T={frames}], got {tuple(seconds.shape)}")


def select_retained(
    x: torch.Tensor, num_retained: int, method: str, *, variant: str | None = None, **keywords: Any
) -> tuple[TokenSelection, torch.Tensor]:
    """:func:`select_tokens` in ``exact`` mode for a caller that holds K already: serving.

    ``evs``, ``vidcom2``, ``dycoke`` and ``visionselector`` do not sync the host. ``score`` does once, to pack the
    policy (a server packs it at start and calls :func:`score_vllm.kernels.ops.select_rows`), and the others for the
    segments or the budgets of the video, which shape everything after.

    Args:
        x: [T, N, D].
        num_retained: K in [1, T * N].
        method, variant: as in :func:`select_tokens`.
        keywords: the other signals of :func:`select_tokens` and options of the method.

    Returns:
        ``(selection, has_nan)``, the second a 0-dim bool tensor on the device of ``x``.

    Raises:
        TypeError: an option is not a number.
        ValueError: a count, shape, method, variant or option is wrong, or the method broke its contract.
    """
    spec = methods.get(method)
    signals = {name: value for name, value in keywords.items() if name in methods.SIGNALS}
    options = {name: value for name, value in keywords.items() if name not in methods.SIGNALS}
    methods.check_options(spec, options)
    frames, per_frame, _ = x.shape
    if not 1 <= num_retained <= frames * per_frame:
        raise ValueError(f"num_retained must be in [1, T*N={frames * per_frame}], got {num_retained}")
    _check_signals(x, signals)
    signals["variant"] = methods.check_variant(spec, variant)
    with torch.no_grad():
        result = methods.call(spec.function, x, num_retained, signals, options)
    if isinstance(result, TokenSelection):
        if result.num_retained != num_retained:
            raise ValueError(f"method {method!r} kept {result.num_retained} tokens, {num_retained} were asked for")
        return result, result.scores.isnan().any()
    indices, has_nan = ops.topk(result, num_retained)
    return TokenSelection(indices, ops.gather(x, indices), result, frames, per_frame), has_nan
