"""The compressor in plain torch: the specification every fast kernel is tested against.

Shapes: T temporal cells, N tokens per cell, D hidden size, H policy width, K retained tokens.
Maths is fp32; both GEMM operands are first rounded to the dtype of ``x``, as the tensor cores see them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from score_vllm.kernels.inputs import DIGITS, PositionTable, second_operand, shift_matrices


def previous(x: torch.Tensor) -> torch.Tensor:
    """The same patch one frame earlier, [T, N, D]; zero before the first frame."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def residual(x: torch.Tensor) -> torch.Tensor:
    """Surprise signal, paper eq. 2: subtract in fp32, round once to the dtype of ``x``.

    Args:
        x: [T, N, D] visual tokens.

    Returns:
        [T, N, D] in the dtype of ``x``; the first frame's residual is the frame itself.
    """
    return (x.float() - previous(x).float()).to(x.dtype)


def score(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    use_residual: bool = True,
) -> torch.Tensor:
    """Retention logits of every token, paper eq. 3-4 without the sigmoid (it does not change the order).

    The hidden layer over ``[x ; residual]`` is ``x A - previous B``, with A = W1 + W2 and B = W2: the same sum, without
    a residual. Where W2 outweighs W1 (:func:`second_operand`) the residual is subtracted first.

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
    tokens = x.float()
    if not use_residual:
        hidden = tokens @ w_in.to(x.dtype).float().T
    elif second_operand(w_in) == "residual":
        w_x, w_r = w_in.to(x.dtype).float().chunk(2, dim=1)
        hidden = tokens @ w_x.T + residual(x).float() @ w_r.T
    else:
        a, b = shift_matrices(w_in, x.dtype)
        hidden = tokens @ a.T - previous(x).float() @ b.T
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


def places(indices: torch.Tensor, table: PositionTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and offsets of kept tokens in the unpruned span.

    Args:
        indices: [K] int64 flat indices.
        table: of the video.

    Returns:
        ``(slots, offsets)``: [K] and [K, 3] int64.
    """
    affine = table.on(indices.device).affine
    n = indices % (table.h * table.w)
    row, column = (n // table.w)[:, None], (n % table.w)[:, None]
    placed = affine[indices // (table.h * table.w)] + row * affine[-2] + column * affine[-1]
    return placed[:, 0], placed[:, 1:]


def digits(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers [R, A] in [0, 2^24) as base-256 digits [R, 3 A], low digit first."""
    shifts = 8 * torch.arange(DIGITS, device=values.device)
    return ((values[:, :, None] >> shifts) & 0xFF).flatten(1)


def kept_channels(
    indices: torch.Tensor, extra: torch.Tensor | PositionTable | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """[K, C] of ``dtype``: the channels that :func:`gather` appends to the rows at ``indices``, or None."""
    if extra is None:
        return None
    if not isinstance(extra, PositionTable):
        return extra[indices].to(dtype)
    position = digits(places(indices, extra)[1])
    return F.pad(position, (0, extra.channels - position.shape[1])).to(dtype)


def structure_rows(
    table: PositionTable, width: int, dtype: torch.dtype, device: torch.device, learned: torch.Tensor | None
) -> torch.Tensor:
    """Rows that always stay, with their channels.

    Args:
        table: of the video.
        width: columns of a row, channels not counted.
        dtype, device: of the result.
        learned: [D <= width] stands in the first columns of every row that is no text; all else is zero.

    Returns:
        [S, width + C].
    """
    structure = table.on(device).structure
    out = torch.zeros(len(structure), width + table.channels, dtype=dtype, device=device)
    if learned is not None:
        out[:, : len(learned)] = learned.to(dtype) * (structure[:, 4:] == 0)
    out[:, width:] = digits(structure[:, 1:])[:, : table.channels].to(dtype)
    return out


def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    channels: torch.Tensor | PositionTable | None = None,
    learned: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kept rows, with their position channels appended and structure rows between them where given.

    Args:
        x: [T, N, W].
        indices: [K] int64 flat indices; ascending where the table has structure rows.
        channels: [T * N, C] values exact in the dtype of ``x``; a table; or None.
        learned: see :func:`structure_rows`.
        rows: [K, D <= W] in place of the first D columns of the kept rows: what a merging method made of them.

    Returns:
        [K, W], [K, W + C] or [S + K, W + C] in the dtype of ``x``, in the order of the unpruned span.
    """
    kept = x.reshape(-1, x.shape[-1])[indices]
    if rows is not None:
        kept = torch.cat([rows, kept[:, rows.shape[1] :]], dim=1)
    values = kept_channels(indices, channels, x.dtype)
    if values is not None:
        kept = torch.cat([kept, values], dim=1)
    if not isinstance(channels, PositionTable) or not channels.num_structure:
        return kept
    structure = structure_rows(channels, x.shape[-1], x.dtype, x.device, learned)
    slots = torch.cat([channels.on(x.device).structure[:, 0], places(indices, channels)[0]])
    return torch.cat([structure, kept])[slots.argsort()]
