"""The compressor's operations, with the backend chosen here. Callers import only this module."""

from __future__ import annotations

import torch

from score_vllm.kernels import reference

# Rows of x per block on the CPU: keeps the fp32 temporaries small beside x.
_CPU_BLOCK_TOKENS = 4096


def score(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    use_residual: bool = True,
) -> torch.Tensor:
    """Retention logits, [T * N] float32. See :func:`score_vllm.kernels.reference.score`."""
    frames, n, _ = x.shape
    step = max(1, _CPU_BLOCK_TOKENS // n)
    out = torch.empty(frames * n, dtype=torch.float32, device=x.device)
    for start in range(0, frames, step):
        stop = min(start + step, frames)
        # One frame of left context gives the block its residual.
        first = max(start - 1, 0)
        block = reference.score(x[first:stop], w_in, b_in, w_out, b_out, use_residual)
        out[start * n : stop * n] = block[(start - first) * n :]
    return out


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact global top-K. See :func:`score_vllm.kernels.reference.topk`."""
    return reference.topk(scores, k)


def gather(x: torch.Tensor, indices: torch.Tensor, channels: torch.Tensor | None = None) -> torch.Tensor:
    """Kept rows and their position channels. See :func:`score_vllm.kernels.reference.gather`."""
    return reference.gather(x, indices, channels)
