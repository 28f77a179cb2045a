"""The compressor's operations, with the backend chosen here. Callers import only this module.

CUDA tensors run the Triton kernels, all others the blocked torch path. Which one ran is told by
:func:`last_backend`. Nothing here synchronises with the host but :func:`pack_weights`, and :func:`score`, which packs.

One file: every operation shares the dispatch and its record.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

from score_vllm.kernels import reference, torch_blocked
from score_vllm.kernels.inputs import PolicyWeights, PositionTable, pack_weights, upload
from score_vllm.layout import grid_layout, interleaved_layout
from score_vllm.types import VideoGrid

__all__ = [
    "BACKENDS",
    "PolicyWeights",
    "PositionTable",
    "SelectedRows",
    "backend_for",
    "force_backend",
    "gather",
    "keep_always",
    "last_backend",
    "pack_weights",
    "score",
    "select_rows",
    "topk",
    "warm_up",
]

BACKENDS = ("triton", "torch")

_forced: str | None = None
_last: dict[str, str] = {}


class SelectedRows(NamedTuple):
    """What :func:`select_rows` returns.

    Attributes:
        buffer: [S + K, W + C] in the dtype of the tokens: kept and structure rows, each followed by its channels.
        indices: [K] int64 flat indices, ascending.
        has_nan: 0-dim bool on the device, True where any score is NaN: the selection is then meaningless.
        scores: [T * N] float32 logits; infinite where tokens are kept always.
    """

    buffer: torch.Tensor
    indices: torch.Tensor
    has_nan: torch.Tensor
    scores: torch.Tensor


def backend_for(tensor: torch.Tensor) -> str:
    """``"triton"`` or ``"torch"``: what the operations would run on this tensor."""
    if _forced is not None:
        return _forced
    return "triton" if tensor.is_cuda and _triton_runs_on(tensor.device) else "torch"


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def last_backend(operation: str) -> str | None:
    """Which backend ran the last call of ``"score"``, ``"topk"``, ``"gather"`` or ``"select_rows"`` in this process.

    Returns:
        ``"triton"``, ``"torch"``, or None where the operation has not run.
    """
    return _last.get(operation)


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run one backend whatever the device: for tests under Triton's interpreter and for comparisons.

    Raises:
        ValueError: not one of :data:`BACKENDS`.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _choose(operation: str, tensor: torch.Tensor) -> str:
    _last[operation] = backend_for(tensor)
    return _last[operation]


def _on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check_tokens(x: torch.Tensor) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be a non-empty [T, N, D] tensor, got {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bf16, fp16 or fp32, got {x.dtype}")


def _check_weights(x: torch.Tensor, weights: PolicyWeights) -> None:
    """``x`` is what the policy reads: whole rows, or their first D columns."""
    if weights.hidden_size != x.shape[2]:
        raise ValueError(f"the policy reads D={weights.hidden_size}, x is {tuple(x.shape)}")
    if weights.w_in.dtype != x.dtype or weights.w_in.device != x.device:
        raise ValueError(
            f"the policy's weights are packed as {weights.w_in.dtype} on {weights.w_in.device}, "
            f"x is {x.dtype} on {x.device}"
        )


def _check_scores(scores: torch.Tensor, k: int) -> None:
    if scores.ndim != 1 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be [M] float32, got {tuple(scores.shape)} {scores.dtype}")
    if not 1 <= k <= scores.shape[0]:
        raise ValueError(f"k must be in [1, {scores.shape[0]}], got {k}")


def _check_channels(x: torch.Tensor, extra: torch.Tensor | PositionTable | None) -> None:
    frames, per_frame, _ = x.shape
    if isinstance(extra, PositionTable):
        if extra.num_cells != frames or extra.h * extra.w != per_frame:
            raise ValueError(
                f"positions are of a {extra.num_cells} x {extra.h} x {extra.w} grid, x is {tuple(x.shape)}"
            )
    elif extra is not None and (extra.ndim != 2 or extra.shape[0] != frames * per_frame):
        raise ValueError(f"channels must be [T * N = {frames * per_frame}, C], got {tuple(extra.shape)}")


def score(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    use_residual: bool = True,
) -> torch.Tensor:
    """Retention logits (paper eq. 2-4 without the sigmoid). See :func:`score_vllm.kernels.reference.score`.

    Not differentiable. Weights of another dtype are cast at every call; :func:`select_rows` takes them packed.

    Args:
        x: [T, N, D] bf16, fp16 or fp32, any strides; not copied.
        w_in, b_in, w_out, b_out, use_residual: as in the reference.

    Returns:
        [T * N] float32.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_tokens(x)
    weights = pack_weights(w_in, b_in, w_out, b_out, x.dtype, use_residual)
    _check_weights(x, weights)
    with torch.no_grad():
        if _choose("score", x) == "torch":
            return torch_blocked.score(x, weights)
        from score_vllm.kernels import score as kernel

        with _on(x):
            return kernel.score(x, weights)


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact global top-K (paper section 4.5), ties to the lower index.

    Args:
        scores: [M] float32, M < 2^31.
        k: 1 <= k <= M.

    Returns:
        ``(indices, has_nan)``: [k] int64 ascending; 0-dim bool. See :func:`score_vllm.kernels.reference.topk`.

    Raises:
        ValueError: ``scores`` is not one-dimensional float32, or ``k`` is out of range.
    """
    _check_scores(scores, k)
    if _choose("topk", scores) == "torch":
        return reference.topk(scores, k)
    from score_vllm.kernels import topk as kernel

    with _on(scores):
        return kernel.select(scores.contiguous()[None], k)[:2]


def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    channels: torch.Tensor | PositionTable | None = None,
    *,
    learned: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kept rows, channels, structure rows between them. See :func:`score_vllm.kernels.reference.gather`.

    Args:
        x: [T, N, W], any strides; not copied.
        indices: [K] int64 flat indices in [0, T * N), ascending where the table has structure rows; not checked.
        channels: [T * N, C] values exact in the dtype of ``x``; a :class:`PositionTable` for the digits of each
            row's (t, h, w) (and, where structure rows are text, of its token id + 1); or None.
        learned: [D <= W] content of structure rows that are no text.
        rows: [K, D <= W] in place of the first D columns of the kept rows.

    Returns:
        [S + K, W + C] contiguous, in the dtype of ``x``, in the order of the unpruned span; S is 0 without a table.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_tokens(x)
    _check_channels(x, channels)
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(f"indices must be [K] int64, got {tuple(indices.shape)} {indices.dtype}")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(indices) or rows.shape[1] > x.shape[2]):
        raise ValueError(f"rows must be [K={len(indices)}, D <= {x.shape[2]}], got {tuple(rows.shape)}")
    if learned is not None and (learned.ndim != 1 or len(learned) > x.shape[2]):
        raise ValueError(f"learned must be [D <= {x.shape[2]}], got {tuple(learned.shape)}")
    return _gather("gather", x, indices, channels, learned, rows)


def _gather(
    operation: str,
    x: torch.Tensor,
    indices: torch.Tensor,
    channels: torch.Tensor | PositionTable | None,
    learned: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    if isinstance(channels, PositionTable):
        channels = channels.on(x.device)
    if _choose(operation, x) == "torch":
        return torch_blocked.gather(x, indices, channels, learned, rows)
    from score_vllm.kernels import gather as kernel

    with _on(x):
        out = kernel.gather(x, indices, channels)
        torch_blocked.finish(out, x, indices, channels, learned, rows)
        return out


def select_rows(
    x: torch.Tensor,
    weights: PolicyWeights,
    k: int,
    positions: torch.Tensor | PositionTable | None = None,
    *,
    width: int | None = None,
    learned: torch.Tensor | None = None,
    always: torch.Tensor | None = None,
) -> SelectedRows:
    """Score, keep the global top K, gather the rows and their positions: the serving path in one call.

    On CUDA this is one memset and six launches (score, three digits, compaction, gather); structure rows and ``always``
    add a few. It can be captured in a CUDA graph after one call of the same dtype and hidden size has compiled the
    kernels.

    Args:
        x: [T, N, W] bf16, fp16 or fp32, any strides; not copied.
        weights: from :func:`pack_weights`, in the dtype of ``x``, on its device.
        k: K in [1, T * N], from :func:`score_vllm.budget.num_retained_tokens`.
        positions: as ``channels`` of :func:`gather`.
        width: D <= W, columns that the policy reads; the rest only travels with the kept rows. None: all.
        learned: as in :func:`gather`.
        always: [E <= K] int64 flat indices that are kept whatever their scores; None: none. On the tokens' device where
            no copy is wanted (under CUDA-graph capture it must be).

    Returns:
        :class:`SelectedRows`: ``buffer`` [S + K, W + C], ``indices`` [K], ``has_nan``, ``scores`` [T * N].

    Raises:
        ValueError: a shape, dtype, device or ``k`` does not fit.
    """
    _check_tokens(x)
    read = x if width is None else x[..., :width]
    _check_weights(read, weights)
    _check_channels(x, positions)
    if not 1 <= k <= x.shape[0] * x.shape[1]:
        raise ValueError(f"k must be in [1, {x.shape[0] * x.shape[1]}], got {k}")
    with torch.no_grad():
        if _choose("select_rows", x) == "torch":
            scores = keep_always(torch_blocked.score(read, weights), always)
            indices, has_nan = reference.topk(scores, k)
        else:
            from score_vllm.kernels import score as score_kernel
            from score_vllm.kernels import topk as topk_kernel

            with _on(x):
                partials = score_kernel.score_partials(read, weights)
                keep_always(partials[0], always)
                indices, has_nan, scores = topk_kernel.select(partials, k)
        return SelectedRows(_gather("select_rows", x, indices, positions, learned), indices, has_nan, scores)


def keep_always(scores: torch.Tensor, always: torch.Tensor | None) -> torch.Tensor:
    """Make the scores at ``always`` infinite, in place; NaN stays NaN."""
    if always is None:
        return scores
    return scores.index_add_(0, upload(always, scores.device), scores.new_full(always.shape, float("inf")))


def warm_up(weights: PolicyWeights, row_width: int | None = None) -> None:
    """Compile what :func:`select_rows` will launch for these weights, so that no request waits for the compiler.

    The kernels depend on dtype, D, W, H and device, not on the video's size; one tiny video compiles them all, once
    without and once with text among its structure rows.
    Tokens that are not whole 16-byte aligned rows use a second variant, compiled when they first appear.

    Args:
        weights: of the policy.
        row_width: W, columns of a row; None: D.
    """
    width = weights.hidden_size
    x = torch.zeros(2, 1, row_width or width, dtype=weights.w_in.dtype, device=weights.w_in.device)
    grid = VideoGrid(2, 1, 1)
    for layout in (grid_layout(grid, 1.0), interleaved_layout(grid, [[0], [0]], [[], []])):
        select_rows(x, weights, 1, PositionTable.from_layout(layout), width=width)
