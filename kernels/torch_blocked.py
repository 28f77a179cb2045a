"""The compressor in blocks of plain torch, in the dtype of the tokens: what the CPU engine runs.

Only one block of the residual, of the concatenation and of the hidden activation exists at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from score_vllm.kernels import reference
from score_vllm.kernels.inputs import PolicyWeights, PositionTable, SecondOperand

# A block's [x ; second operand] and hidden activation take about 2.7 of its rows of X (D = 3584, H = 512): a 64th of X
# keeps them near 4 %, beside what the GEMM library needs to pack the weights. Below 128 rows that packing takes too
# long: videos of fewer than about 3,500 tokens need more than a tenth of X, but only a few megabytes. A CPU that cannot
# multiply the dtype of X casts weights and blocks to fp32: there the tenth holds from about 26,000 tokens on (D = 3584,
# H = 512; 19 MB, of which the weights are 15).
_BLOCKS = 64
_MIN_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 1024


def _gemm_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype of the product's operands: that of ``x`` where the CPU multiplies it natively, else float32."""
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return x.dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return x.dtype if x.dtype in native and native[x.dtype]() else torch.float32


def score(x: torch.Tensor, weights: PolicyWeights) -> torch.Tensor:
    """Retention logits, [T * N] float32. See :func:`score_vllm.kernels.reference.score`.

    Args:
        x: [T, N, D], any strides.
        weights: in the dtype of ``x``, on its device.
    """
    frames, per_frame, d = x.shape
    dtype = _gemm_dtype(x)
    w_in = weights.w_in.to(dtype)  # [H, 2D]
    # A block that is cast to fp32 takes twice the memory.
    blocks = _BLOCKS if dtype == x.dtype else 2 * _BLOCKS
    target = min(max(frames * per_frame // blocks, _MIN_BLOCK_TOKENS), _MAX_BLOCK_TOKENS)
    cells = max(1, target // per_frame)
    pieces = -(-per_frame // target)
    tokens = -(-per_frame // pieces)
    block = torch.empty(cells * tokens * w_in.shape[1], dtype=dtype, device=x.device)
    out = torch.empty(frames, per_frame, dtype=torch.float32, device=x.device)
    for t0 in range(0, frames, cells):
        t1 = min(t0 + cells, frames)
        for n0 in range(0, per_frame, tokens):
            n1 = min(n0 + tokens, per_frame)
            rows = (t1 - t0) * (n1 - n0)
            inputs = block[: rows * w_in.shape[1]].view(t1 - t0, n1 - n0, w_in.shape[1])
            inputs[..., :d].copy_(x[t0:t1, n0:n1])
            if weights.second != "none":
                _second_into(inputs[..., d:], x[:, n0:n1], t0, t1, weights.second)
            active = _active(inputs.view(rows, -1), w_in, weights.b_in)  # [rows, H]
            # Not a matrix-vector product: that rounds a row by its place in the block, and equal tokens must tie.
            logits = active.mul_(weights.w_out).sum(dim=1)
            out[t0:t1, n0:n1] = logits.add_(weights.b_out).view(t1 - t0, n1 - n0)
    return out.view(-1)


def _active(inputs: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor) -> torch.Tensor:
    """GELU of the hidden layer, [rows, H] float32."""
    if inputs.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN adds the bias and applies GELU to the product in fp32; its fp32 product is faster than MKL's on AMD.
        return torch.ops.mkldnn._linear_pointwise(inputs, w_in, b_in, "gelu", [], "none").float()
    return F.gelu(F.linear(inputs, w_in).float().add_(b_in))


def _second_into(out: torch.Tensor, x: torch.Tensor, t0: int, t1: int, second: SecondOperand) -> None:
    """Write what the second half of the weights multiplies into ``out`` [t1 - t0, n, D], for frames [t0, t1)."""
    if t0 == 0:
        if second == "previous":
            out[0].zero_()
        else:
            out[0].copy_(x[0])
        out, t0 = out[1:], 1
    current, previous = x[t0:t1], x[t0 - 1 : t1 - 1]
    if second == "previous":
        out.copy_(previous)
    elif out.dtype == x.dtype:
        torch.sub(current, previous, out=out)
    else:
        # Rounded once, to the dtype of x, as everywhere.
        out.copy_(current - previous)


def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    extra: torch.Tensor | PositionTable | None,
    learned: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of ``x`` with their extra channels, without a copy of ``x``. See :func:`reference.gather`."""
    _, per_frame, width = x.shape
    kept = indices.shape[0]
    values = reference.kept_channels(indices, extra, x.dtype)
    channels = 0 if values is None else values.shape[1]
    out = torch.empty(kept + num_structure(extra), width + channels, dtype=x.dtype, device=x.device)
    target = kept_places(indices, extra)
    for start in range(0, kept, _MIN_BLOCK_TOKENS):
        block = slice(start, start + _MIN_BLOCK_TOKENS)
        out[target[block], :width] = x[indices[block] // per_frame, indices[block] % per_frame]
    if values is not None:
        out[target, width:] = values
    finish(out, x, indices, extra, learned, rows)
    return out


def num_structure(extra: torch.Tensor | PositionTable | None) -> int:
    """S, the rows that :func:`gather` adds to the kept ones."""
    return extra.num_structure if isinstance(extra, PositionTable) else 0


def kept_places(indices: torch.Tensor, extra: torch.Tensor | PositionTable | None) -> torch.Tensor:
    """[K] int64: the row of the result in which each kept token stands.

    A token's slot minus its index is the number of structure rows before it; its rank, of kept ones.
    """
    rank = torch.arange(indices.shape[0], device=indices.device)
    if not isinstance(extra, PositionTable) or not extra.num_structure:
        return rank
    return rank + reference.places(indices, extra)[0] - indices


def finish(
    out: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    extra: torch.Tensor | PositionTable | None,
    learned: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Write structure rows and merged rows into the result of a gather; does nothing where there are none."""
    if isinstance(extra, PositionTable) and extra.num_structure:
        slots = extra.on(x.device).structure[:, 0]
        rank = torch.arange(len(slots), device=x.device)
        # A structure row's slot minus its rank is the number of vision tokens before it.
        place = rank + torch.searchsorted(indices, slots - rank)
        out[place] = reference.structure_rows(extra, x.shape[2], x.dtype, x.device, learned)
    if rows is not None:
        out[kept_places(indices, extra), : rows.shape[1]] = rows
