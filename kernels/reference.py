"""The compressor in plain torch: the specification every fast kernel is tested against.

Shapes: T temporal cells, N tokens per cell, D hidden size, H policy width, K retained tokens.
Maths is fp32; both GEMM operands are first rounded to the dtype of ``x``, as the tensor cores see them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from score_vllm.kernels.inputs import DIGITS, POSITION_CHANNELS, PositionTable


def residual(x: torch.Tensor) -> torch.Tensor:
    """Surprise signal, paper eq. 2: subtract in fp32, round once to the dtype of ``x``.

    Args:
        x: [T, N, D] visual tokens.

    Returns:
        [T, N, D] in the dtype of ``x``; the first frame's residual is the frame itself.
    """
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return (x.float() - previous.float()).to(x.dtype)


def score(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    use_residual: bool = True,
) -> torch.Tensor:
    """Retention logits of every token, paper eq. 3-4 without the sigmoid (it does not change the order).

    Args:
        x: [T, N, D] float tokens.
        w_in: [H, 2D] weight of the hidden layer over ``[x ; residual]`` ([H, D] without the residual).
        b_in: [H].
        w_out: [H] weight of the output.
        b_out: [1].
        use_residual: False drops the surprise half (the paper's table 5).

    Returns:
        [T * N] float32 logits.
    """
    d = x.shape[-1]
    w = w_in.to(x.dtype).float()
    hidden = x.float() @ w[:, :d].T
    if use_residual:
        hidden = hidden + residual(x).float() @ w[:, d:].T
    hidden = F.gelu(hidden + b_in.float())
    # A matrix-vector product would round a row by its place, and equal tokens must tie.
    return ((hidden * w_out.float()).sum(dim=-1) + b_out.float()).reshape(-1)


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact global top-K, paper section 4.5; ties go to the lower index, NaN ranks below everything.

    Args:
        scores: [M] float32.
        k: number to keep, 1 <= k <= M.

    Returns:
        ``(indices, has_nan)``: [k] int64 ascending, and a 0-dim bool tensor that is True where any score is
        NaN. The caller decides what to do about it: no host sync happens here.

    Raises:
        ValueError: ``scores`` is not one-dimensional float32, or ``k`` is out of range.
    """
    if scores.ndim != 1 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be [M] float32, got {tuple(scores.shape)} {scores.dtype}")
    if not 1 <= k <= scores.shape[0]:
        raise ValueError(f"k must be in [1, {scores.shape[0]}], got {k}")
    nan = torch.isnan(scores)
    order = torch.sort(scores.masked_fill(nan, float("-inf")), descending=True, stable=True).indices
    return torch.sort(order[:k]).values, nan.any()


def position_digits(indices: torch.Tensor, table: PositionTable) -> torch.Tensor:
    """Offsets (t, h, w) of kept tokens from the video's base position, as base-256 digits, low digit first.

    Args:
        indices: [K] int64 flat indices.
        table: of the video.

    Returns:
        [K, 9] int64 in [0, 256): ``positions.pack_offsets(positions.video_offsets(...))`` of these tokens.
    """
    t, n = indices // (table.h * table.w), indices % (table.h * table.w)
    offsets = torch.stack([table.on(indices.device)[t], n // table.w, n % table.w], dim=-1)  # [K, 3]
    shifts = 8 * torch.arange(DIGITS, device=indices.device)
    return ((offsets[:, :, None] >> shifts) & 0xFF).reshape(-1, POSITION_CHANNELS)


def kept_channels(
    indices: torch.Tensor, extra: torch.Tensor | PositionTable | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """[K, C] of ``dtype``: the channels that :func:`gather` appends to the rows at ``indices``, or None."""
    if extra is None:
        return None
    values = position_digits(indices, extra) if isinstance(extra, PositionTable) else extra[indices]
    return values.to(dtype)


def gather(
    x: torch.Tensor, indices: torch.Tensor, channels: torch.Tensor | PositionTable | None = None
) -> torch.Tensor:
    """Kept rows, with their position channels appended where given.

    Args:
        x: [T, N, D].
        indices: [K] int64 flat indices.
        channels: [T * N, C] values exact in the dtype of ``x``; a table to derive 9 position digits from; or None.

    Returns:
        [K, D] or [K, D + C] in the dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])[indices]
    values = kept_channels(indices, channels, x.dtype)
    return rows if values is None else torch.cat([rows, values], dim=1)
