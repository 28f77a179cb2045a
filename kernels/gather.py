"""Kept rows and their packed positions, written once into the hand-over buffer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from score_vllm.kernels.inputs import DIGITS, PositionTable

ROWS_PER_PROGRAM = 4
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["num_kept", "num_cells", "per_frame", "grid_w"])
def gather_kernel(
    x,
    indices,
    extra,
    out,
    num_kept,
    num_cells,
    per_frame,
    grid_w,
    stride_t,
    stride_n,
    stride_d,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    DIGITS: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of ``out`` [S + num_kept, D + CHANNELS] that hold kept tokens.

    ``extra`` is the table's [T + 2, 4] int64 ``affine`` (PACK) or [T * N, CHANNELS] values.
    """
    slots = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot_ok = slots < num_kept
    kept = tl.load(indices + slots, mask=slot_ok, other=0)  # [ROWS] int64
    t = kept // per_frame
    n = kept % per_frame
    source = x + (t * stride_t + n * stride_n)[:, None]
    if PACK:
        row, column = n // grid_w, n % grid_w
        down, right = extra + num_cells * 4, extra + num_cells * 4 + 4
        # Slot in the unpruned span, minus the index: the structure rows before this token.
        place = tl.load(extra + t * 4, mask=slot_ok, other=0) + row * tl.load(down) + column * tl.load(right)
        slots += place - kept
    target = out + (slots * (D + CHANNELS))[:, None]
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = slot_ok[:, None] & (columns < D)[None, :]
    rows = tl.load(source + (columns * stride_d)[None, :], mask=mask)  # [ROWS, BLOCK_D]
    tl.store(target + columns[None, :], rows, mask=mask)
    if CHANNELS > 0:  # noqa: SIM102 (decided by the compiler, the inner one by the program)
        if tl.program_id(1) == 0:
            channel = tl.arange(0, BLOCK_C)
            mask_c = slot_ok[:, None] & (channel < CHANNELS)[None, :]
            if PACK:
                # Channels past the third axis are of text rows: zero here.
                axis = 1 + channel // DIGITS
                axis_ok = axis < 4
                steps = tl.load(down + axis, mask=axis_ok, other=0)[None, :] * row[:, None]
                steps += tl.load(right + axis, mask=axis_ok, other=0)[None, :] * column[:, None]
                mask_p = slot_ok[:, None] & axis_ok[None, :]
                offset = steps + tl.load(extra + (t * 4)[:, None] + axis[None, :], mask=mask_p, other=0)
                digit = (channel % DIGITS).to(tl.int64)[None, :]
                values = ((offset >> (8 * digit)) & 0xFF).to(tl.float32)
            else:
                values = tl.load(extra + (kept * CHANNELS)[:, None] + channel[None, :], mask=mask_c)
            tl.store(target + D + channel[None, :], values.to(out.dtype.element_ty), mask=mask_c)


def gather(x: torch.Tensor, indices: torch.Tensor, extra: torch.Tensor | PositionTable | None) -> torch.Tensor:
    """Rows of ``x`` with their extra channels at their places; rows of structure tokens stay unwritten.

    Args:
        x: [T, N, W], any strides.
        indices: [K] int64 flat indices, ascending where the table has structure rows.
        extra: a :class:`PositionTable` on the device of ``x``, [T * N, C] channels in the dtype of ``x``, or None.

    Returns:
        [S + K, W + C] in the dtype of ``x``; see :func:`score_vllm.kernels.reference.gather`.
    """
    frames, per_frame, d = x.shape
    num_kept = indices.shape[0]
    pack = isinstance(extra, PositionTable)
    values: torch.Tensor | None
    if isinstance(extra, PositionTable):
        channels, grid_w, values, num_structure = extra.channels, extra.w, extra.affine, extra.num_structure
    else:
        channels, grid_w, num_structure = (0 if extra is None else extra.shape[1]), 1, 0
        values = None if extra is None else extra.contiguous()
    out = torch.empty(num_kept + num_structure, d + channels, dtype=x.dtype, device=x.device)
    block_d = min(1024, triton.next_power_of_2(d))
    grid = (triton.cdiv(num_kept, ROWS_PER_PROGRAM), triton.cdiv(d, block_d))
    gather_kernel[grid](
        x, indices, values, out, num_kept, frames, per_frame, grid_w, *x.stride(),
        D=d, CHANNELS=channels, DIGITS=DIGITS, PACK=pack, ROWS=ROWS_PER_PROGRAM, BLOCK_D=block_d,
        BLOCK_C=triton.next_power_of_2(max(channels, 1)), **OPTIONS,
    )  # fmt: skip
    return out
