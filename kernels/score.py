"""Retention logits in one Triton pass over the tokens: hidden layer, GELU and output product.

The hidden layer over ``[x ; residual]`` is the same sum as ``x A - previous B`` (``inputs.shift_matrices``): a plain
GEMM over 2 * D columns whose second half reads the rows of one frame earlier. Both operands of every product come from
shared memory, no residual is formed, and neither ``[x ; previous]`` nor the hidden activation is ever written. One
program owns BLOCK_M tokens and BLOCK_H hidden units. What leaves is one float per token and group of GROUP hidden
units, ``partials`` [H / GROUP, T * N]; :func:`combine_rows` adds them in a fixed order where the logits are first
needed, which keeps them bit-reproducible without atomics.

Policies whose norms ask for it (``inputs.second_operand``) subtract first instead, in registers.

Cost, with M = T * N and S = H / BLOCK_H programs per token tile (paper's size: M = 42,566, D = 3584, H = 512):

* 4 * M * D * H FLOP (0.31 TFLOP), all but the epilogue in matrix instructions;
* device memory: X once (305 MB) and the weights once (7 MB) where L2 holds a frame: programs that share tokens run
  side by side, and ``previous`` is what other programs read as ``x`` one frame earlier;
* L2 to the multiprocessors: 2 * (BLOCK_M + BLOCK_H) * D elements per program, 3.7 GB in 128 x 256 tiles: the
  traffic of a plain GEMM in the same tiles;
* written: M * H / GROUP floats (1.4 MB).

The last, partly filled wave of tiles is cut into pieces of BLOCK_M x GROUP (``main_tiles``), so that a few left-over
tiles do not hold the whole chip for a full tile's time. GROUP is the unit of the epilogue's sum for every
tile shape, so a token's logit does not depend on the tile that it falls in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from score_vllm.kernels.configs import GROUP, ScoreConfig, architecture, main_tiles, score_config
from score_vllm.kernels.inputs import PolicyWeights

_COMBINE_BLOCK = 1024
# Multiprocessors assumed where there is no GPU: under Triton's interpreter.
_INTERPRETER_SMS = 4


@triton.jit
def _store_partials(acc, b_in, w_out, b_out, partials, rows, num_rows, h0, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """GELU and output product of hidden units [h0, h0 + WIDTH), GROUP units at a time."""
    if WIDTH > GROUP:
        # Halve the accumulator in registers: a whole [BLOCK_M, BLOCK_H] epilogue spills.
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDTH // 2)), (0, 2, 1))
        low, high = tl.split(halves)  # [BLOCK_M, WIDTH / 2] each
        _store_partials(low, b_in, w_out, b_out, partials, rows, num_rows, h0, WIDTH // 2, GROUP)
        _store_partials(high, b_in, w_out, b_out, partials, rows, num_rows, h0 + WIDTH // 2, WIDTH // 2, GROUP)
    else:
        units = h0 + tl.arange(0, GROUP)
        hidden = acc + tl.load(b_in + units)[None, :]  # [BLOCK_M, GROUP]
        active = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
        partial = tl.sum(active * tl.load(w_out + units)[None, :], axis=1)  # [BLOCK_M]
        partial += tl.where(h0 == 0, tl.load(b_out), 0.0)
        row = rows.to(tl.int64) + (h0 // GROUP).to(tl.int64) * num_rows
        tl.store(partials + row, partial, mask=rows < num_rows)


@triton.jit
def _score_tile(
    x,
    w,
    b_in,
    w_out,
    b_out,
    partials,
    m0,
    h0,
    num_rows,
    per_frame,
    stride_t,
    stride_n,
    stride_d,
    D: tl.constexpr,
    SECOND: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partials of tokens [m0, m0 + BLOCK_M) and hidden units [h0, h0 + BLOCK_H)."""
    rows = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    # The residual form takes both halves of w in one step, the plain product one after the other.
    HALF: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = 2 * HALF if SECOND == "previous" else HALF
    if TMA:
        for step in range(STEPS):
            second = step // HALF
            k0 = (step - second * HALF) * BLOCK_K
            # Rows before the video read as zero: the first frame has no previous one, and is its own residual.
            # So do columns of x past D, so what w holds there does not matter.
            x_tile = x.load([m0 - second * per_frame, k0])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot(x_tile, w.load([h0, second * D + k0]).T, acc)
            if SECOND == "residual":
                p_tile = x.load([m0 - per_frame, k0])
                r_tile = (x_tile.to(tl.float32) - p_tile.to(tl.float32)).to(x_tile.dtype)
                acc = tl.dot(r_tile, w.load([h0, D + k0]).T, acc)
    else:
        row_ok = rows < num_rows
        row_offset = (rows // per_frame).to(tl.int64) * stride_t + (rows % per_frame).to(tl.int64) * stride_n
        columns = tl.arange(0, BLOCK_K)
        x_ptr = x + row_offset[:, None] + (columns * stride_d)[None, :]  # [BLOCK_M, BLOCK_K]
        w_row = (h0 + tl.arange(0, BLOCK_H)).to(tl.int64) * (D if SECOND == "none" else 2 * D)
        w_ptr = w + w_row[None, :] + columns[:, None]  # [BLOCK_K, BLOCK_H]
        for step in range(STEPS):
            second = step // HALF
            k0 = (step - second * HALF) * BLOCK_K
            x_from = x_ptr + (tl.cast(k0, tl.int64) * stride_d - second * stride_t)
            w_from = w_ptr + (second * D + k0)
            column_ok = columns < D - k0
            x_ok = (row_ok & (rows >= second * per_frame))[:, None]
            if D % BLOCK_K == 0:
                x_tile = tl.load(x_from, mask=x_ok, other=0.0)
                w_tile = tl.load(w_from)
            else:
                x_tile = tl.load(x_from, mask=x_ok & column_ok[None, :], other=0.0)
                w_tile = tl.load(w_from, mask=column_ok[:, None], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            if SECOND == "residual":
                p_mask = (row_ok & (rows >= per_frame))[:, None] & column_ok[None, :]
                p_tile = tl.load(x_from - stride_t, mask=p_mask, other=0.0)
                w_r = tl.load(w_from + D, mask=column_ok[:, None], other=0.0)
                r_tile = (x_tile.to(tl.float32) - p_tile.to(tl.float32)).to(x_tile.dtype)
                acc = tl.dot(r_tile, w_r, acc, input_precision=PRECISION)
    _store_partials(acc, b_in, w_out, b_out, partials, rows, num_rows, h0, BLOCK_H, GROUP)


@triton.jit(do_not_specialize=["num_rows", "per_frame", "main_tiles"])
def score_kernel(
    x,
    w_main,
    w_tail,
    b_in,
    w_out,
    b_out,
    partials,
    num_rows,
    per_frame,
    main_tiles,
    stride_t,
    stride_n,
    stride_d,
    D: tl.constexpr,
    H: tl.constexpr,
    SECOND: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs [0, main_tiles * H / BLOCK_H) take whole tiles, the rest pieces that are GROUP units wide."""
    pid = tl.program_id(0)
    # Programs that share tokens are neighbours, so that their tokens meet in L2.
    main_programs = main_tiles * (H // BLOCK_H)
    if pid < main_programs:
        m0 = (pid // (H // BLOCK_H)) * BLOCK_M
        h0 = (pid % (H // BLOCK_H)) * BLOCK_H
        _score_tile(
            x, w_main, b_in, w_out, b_out, partials, m0, h0, num_rows, per_frame, stride_t, stride_n, stride_d,
            D, SECOND, TMA, PRECISION, GROUP, BLOCK_M, BLOCK_H, BLOCK_K,
        )  # fmt: skip
    elif BLOCK_H > GROUP:
        piece = pid - main_programs
        m0 = (main_tiles + piece // (H // GROUP)) * BLOCK_M
        h0 = (piece % (H // GROUP)) * GROUP
        _score_tile(
            x, w_tail, b_in, w_out, b_out, partials, m0, h0, num_rows, per_frame, stride_t, stride_n, stride_d,
            D, SECOND, TMA, PRECISION, GROUP, BLOCK_M, GROUP, BLOCK_K,
        )  # fmt: skip


@triton.jit
def combine_rows(partials, rows, num_rows, mask, GROUPS: tl.constexpr):
    """Logits of ``rows``: the sum of their GROUPS partials, always in the same order."""
    logits = tl.load(partials + rows, mask=mask, other=0.0)
    for group in tl.static_range(1, GROUPS):
        logits += tl.load(partials + group * num_rows.to(tl.int64) + rows, mask=mask, other=0.0)
    return logits


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(partials, scores, num_rows, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """partials [GROUPS, num_rows] -> scores [num_rows]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    tl.store(scores + rows, combine_rows(partials, rows, num_rows, mask, GROUPS), mask=mask)


def _row_stride(x: torch.Tensor) -> int | None:
    """Stride between consecutive rows of [T * N, D], or None where T and N do not fold into one dimension."""
    frames, per_frame, _ = x.shape
    if frames == 1:
        return x.stride(1)
    if per_frame == 1:
        return x.stride(0)
    return x.stride(1) if x.stride(0) == per_frame * x.stride(1) else None


def _fits_tma(x: torch.Tensor, weights: PolicyWeights) -> bool:
    """Whether tokens and weights meet the accelerator's rules: whole rows, 16-byte aligned base and stride."""
    stride = _row_stride(x)
    if stride is None or stride == 0 or x.stride(2) != 1:
        return False
    aligned = x.data_ptr() % 16 == 0 and weights.w_in.data_ptr() % 16 == 0
    return aligned and stride * x.itemsize % 16 == 0 and weights.w_in.stride(0) * x.itemsize % 16 == 0


def launch_arguments(weights: PolicyWeights, config: ScoreConfig, tma: bool) -> dict[str, Any]:
    """Compile-time arguments and options of :func:`score_kernel` for a configuration."""
    return {
        "D": weights.hidden_size,
        "H": weights.width,
        "SECOND": weights.second,
        "TMA": tma,
        "PRECISION": "ieee",
        "GROUP": GROUP,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def score_partials(
    x: torch.Tensor, weights: PolicyWeights, config: ScoreConfig | None = None, num_sms: int | None = None
) -> torch.Tensor:
    """One launch: logits of every token, still in H / GROUP addends (paper eq. 2-4 without the sigmoid).

    Args:
        x: [T, N, D] bf16, fp16 or fp32, any strides.
        weights: in the dtype of ``x``, on its device.
        config: tile shape; from the committed table by default.
        num_sms: multiprocessors to balance the tiles over; those of the device by default.

    Returns:
        [H / GROUP, T * N] float32, H rounded up to a multiple of GROUP; sum over the first dimension for logits.
    """
    weights = weights.padded(GROUP)
    frames, per_frame, _ = x.shape
    num_rows = frames * per_frame
    if x.is_cuda:
        device = torch.cuda.get_device_properties(x.device)
        arch, device_sms = architecture((device.major, device.minor)), device.multi_processor_count
    else:
        arch, device_sms = "sm_90", _INTERPRETER_SMS
    config = config or score_config(arch, x.itemsize, weights.width, weights.second)
    tma = config.tma and _fits_tma(x, weights)
    tiles = triton.cdiv(num_rows, config.block_m)
    whole = main_tiles(num_rows, weights.width, config, num_sms or device_sms)
    x_argument, w_main, w_tail = x, weights.w_in, weights.w_in
    if tma:
        rows = TensorDescriptor(x, [num_rows, x.shape[2]], [_row_stride(x), 1], [config.block_m, config.block_k])
        main = TensorDescriptor.from_tensor(weights.w_in, [config.block_h, config.block_k])
        x_argument, w_main, w_tail = rows, main, replace(main, block_shape=[GROUP, config.block_k])
    partials = torch.empty(weights.width // GROUP, num_rows, dtype=torch.float32, device=x.device)
    programs = whole * (weights.width // config.block_h) + (tiles - whole) * (weights.width // GROUP)
    score_kernel[(programs,)](
        x_argument, w_main, w_tail, weights.b_in, weights.w_out, weights.b_out, partials,
        num_rows, per_frame, whole, *x.stride(), **launch_arguments(weights, config, tma),
    )  # fmt: skip
    return partials


def score(x: torch.Tensor, weights: PolicyWeights) -> torch.Tensor:
    """Retention logits, [T * N] float32. See :func:`score_vllm.kernels.reference.score`."""
    partials = score_partials(x, weights)
    groups, num_rows = partials.shape
    if groups == 1:
        return partials[0]
    scores = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, _COMBINE_BLOCK),)
    combine_kernel[grid](partials, scores, num_rows, GROUPS=groups, BLOCK=_COMBINE_BLOCK, enable_fp_fusion=True)
    return scores
