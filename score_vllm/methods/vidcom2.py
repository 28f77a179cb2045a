"""VidCom2 (arXiv 2505.14454): frame budgets and tokens by distance from the video's and the frame's centre."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.methods import register
from score_vllm.methods.common import frame_blocks, ranks, rows_at
from score_vllm.types import TokenSelection

ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01


def steady_channels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The half of the channels with the lowest population variance over the video (VidCom2, step 1).

    Args:
        x: [T, N, D].

    Returns:
        ``(channels, finite)``: [max(1, D // 2)] int64 channel numbers, ascending, and a 0-dim bool that is
        False where ``x`` has NaN or infinite values: those channels are the first to be left out, so that
        nothing after would show them.
    """
    d = x.shape[-1]
    total = x.shape[0] * x.shape[1]
    mean = torch.zeros(d, dtype=torch.float32, device=x.device)
    for start, stop in frame_blocks(x):
        mean += x[start:stop].float().sum(dim=(0, 1)) / total
    variance = torch.zeros_like(mean)
    for start, stop in frame_blocks(x):
        variance += (x[start:stop].float() - mean).square().sum(dim=(0, 1)) / total
    return torch.sort(variance, stable=True).indices[: max(1, d // 2)].sort().values, mean.isfinite().all()


def _kernel(u: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    squared = (u - centre).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * alpha)) for alpha in ALPHAS]).sum(0)


def closeness(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How close each token is to the video's centre (V) and to its frame's (W) (VidCom2, steps 2 and 3).

    Args:
        x: [T, N, D].

    Returns:
        ``(V, W)``, each [T, N] float32 in (0, 5]: a sum of five Gaussian kernels. V is NaN where ``x`` is not
        finite.
    """
    channels, finite = steady_channels(x)

    def unit(start: int, stop: int) -> torch.Tensor:
        return F.normalize(x[start:stop].index_select(-1, channels).float(), dim=-1)

    frame_centres = torch.cat([unit(start, stop).mean(dim=1) for start, stop in frame_blocks(x)])
    # Frames are equally large, so the mean of their means is the mean over all tokens.
    centre = frame_centres.mean(dim=0)
    video, frame = [], []
    for start, stop in frame_blocks(x):
        u = unit(start, stop)
        video.append(_kernel(u, centre))
        frame.append(_kernel(u, frame_centres[start:stop, None]))
    return torch.where(finite, torch.cat(video), torch.nan), torch.cat(frame)


def frame_budgets(v: torch.Tensor, retention_ratio: float) -> torch.Tensor:
    """Tokens per frame: more for frames unlike the video's centre (VidCom2, step 4).

    Args:
        v: [T, N] closeness to the video's centre.
        retention_ratio: rho in (0, 1].

    Returns:
        [T] int64 in [1, N]; the sum is near rho * T * N but not equal to it.
    """
    frames, per_frame = v.shape
    unlike = -v.mean(dim=1)
    share = torch.softmax((unlike - unlike.max()) / TEMPERATURE, dim=0)
    ratios = (retention_ratio * (1 + share - 1 / frames)).clamp(max=1.0)
    return torch.round(ratios * per_frame).long().clamp(1, per_frame)


def _ordered(v: torch.Tensor, w: torch.Tensor, retention_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[T * N] flat indices, the frames' own picks first and by V + W among each; and [T, N] the picks."""
    both = v + w
    picked = ranks(both) < frame_budgets(v, retention_ratio)[:, None]
    by_closeness = torch.sort(both.flatten(), stable=True).indices
    left_out = ~picked.flatten()[by_closeness]
    return by_closeness[torch.sort(left_out.to(torch.uint8), stable=True).indices], picked


def reference(x: torch.Tensor, retention_ratio: float, *, variant: str = "paper", **_: Any) -> TokenSelection:
    """VidCom2 as published, or as in vLLM 0.33.

    Args:
        x: [T, N, D]; the published code needs D >= 2.
        retention_ratio: rho in (0, 1].
        variant: ``paper``: the sum of the frame budgets is kept, whatever it is. ``vllm``: reconciled to
            ``max(T, min(int(T * N * (1 - q)), T * N))`` tokens, q = 1 - rho.

    Returns:
        The kept tokens, ascending; scores are -(V + W).
    """
    v, w = closeness(x)
    order, picked = _ordered(v, w, retention_ratio)
    total, count = v.numel(), int(picked.sum())
    if variant == "vllm":
        q = 1 - retention_ratio
        count = max(v.shape[0], min(int(total * (1 - q)), total))
    return rows_at(x, order[:count].sort().values, -(v + w))


@register("vidcom2", reference=reference, variants=("paper", "vllm"))
def vidcom2(x: torch.Tensor, num_retained: int, **_: Any) -> TokenSelection:
    """VidCom2 (arXiv 2505.14454) at exactly K tokens.

    The frame budgets of rho = K / (T * N) are reconciled over the whole video, as vLLM does: of the picks the
    tokens closest to the centres go, or of the rest the least close are added, until K are left. Both
    variants are the same here; the published code has no exact count of its own.

    Args:
        x: [T, N, D].
        num_retained: K.

    Returns:
        The selection; scores are -(V + W), which rank tokens inside a frame.
    """
    v, w = closeness(x)
    order, _picked = _ordered(v, w, num_retained / v.numel())
    return rows_at(x, order[:num_retained].sort().values, -(v + w))
