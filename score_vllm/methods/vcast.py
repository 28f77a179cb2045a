"""V-CAST (its repository names no paper that we read): frame budgets by the curvature of the video's path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.methods import register
from score_vllm.methods.common import check_number, everything, frame_blocks, masked_indices, ranks, rows_at
from score_vllm.types import TokenSelection

TEMPERATURE = 0.7
EPSILON = 1e-6


def frame_directions(x: torch.Tensor) -> torch.Tensor:
    """[T, D] float32: the mean token of each frame of ``x`` [T, N, D], scaled to length 1."""
    means = torch.cat([x[start:stop].float().mean(dim=1) for start, stop in frame_blocks(x)])
    return F.normalize(means, dim=-1)


def curvature(directions: torch.Tensor) -> torch.Tensor:
    """[T] float32: how sharply the path of the frame directions [T, D] turns at each frame; 1 at both ends."""
    out = torch.ones(directions.shape[0], device=directions.device)
    if len(out) > 2:
        steps = directions[1:] - directions[:-1]
        out[1:-1] = 1 - torch.cosine_similarity(steps[:-1], steps[1:], dim=-1, eps=EPSILON)
    return out


def frame_budgets(curvatures: torch.Tensor, total: int, per_frame: int, min_k: int) -> list[int]:
    """Tokens per frame, ``total`` in all: ``min_k`` each and the rest by softmax(curvature / 0.7), rounded down.

    What rounding leaves goes to the frame with the largest fraction until that frame is full, then to the next: the
    published rule, which can fill one frame.
    """
    frames = len(curvatures)
    quota = torch.softmax(curvatures / TEMPERATURE, dim=0) * (total - frames * min_k)
    budgets = [min_k + min(int(q), per_frame - min_k) for q in quota.floor().tolist()]
    fractions = (quota - quota.floor()).tolist()
    missing = total - sum(budgets)
    for t in sorted(range(frames), key=lambda t: -fractions[t]):
        given = min(missing, per_frame - budgets[t])
        budgets[t] += given
        missing -= given
    return budgets


def token_scores(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """[T, N] float32: distance from the frame's direction plus the norm, scaled to [0, 1] inside the frame."""
    out = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    for start, stop in frame_blocks(x):
        block = x[start:stop].float()
        norms = block.norm(dim=-1)
        low, high = norms.amin(1, keepdim=True), norms.amax(1, keepdim=True)
        unlike = 1 - torch.cosine_similarity(block, directions[start:stop, None], dim=-1)
        out[start:stop] = unlike + (norms - low) / (high - low + EPSILON)
    return out


def _keep(x: torch.Tensor, total: int, min_k: int) -> TokenSelection:
    if total == x.shape[0] * x.shape[1]:
        return everything(x)
    directions = frame_directions(x)
    scores = token_scores(x, directions)
    budgets = frame_budgets(curvature(directions).nan_to_num(1.0), total, x.shape[1], min_k)
    mask = ranks(scores, descending=True) < torch.tensor(budgets, device=x.device)[:, None]
    return rows_at(x, masked_indices(mask, total), scores)


def reference(x: torch.Tensor, retention_ratio: float, *, min_k: int = 1, **_: Any) -> TokenSelection:
    """V-CAST as its code runs, for any ratio (there 0.25 is written into the code).

    Args:
        x: [T, N, D]; a video of one frame is kept whole.
        retention_ratio: rho in (0, 1].
        min_k: fewest tokens of a frame.

    Returns:
        The ``max(round(rho * T * N), T * min_k)`` tokens, ascending.

    Raises:
        TypeError, ValueError: ``min_k`` is not an integer in [1, N].
    """
    frames, per_frame, _d = x.shape
    check_number("vcast", "min_k", min_k, 1, per_frame, whole=True)
    total = frames * per_frame
    if frames == 1:
        return everything(x)
    return _keep(x, max(min(max(round(total * retention_ratio), 1), total), frames * min_k), min_k)


@register("vcast", reference=reference)
def vcast(x: torch.Tensor, num_retained: int, *, min_k: int = 1, **_: Any) -> TokenSelection:
    """V-CAST at exactly K tokens: frames where the video turns keep more, of each the unlike and the large tokens.

    Frames share K as published; where K is less than ``min_k`` per frame the smallest share is 0. A video of one
    frame is ranked like any other.

    Args:
        x: [T, N, D].
        num_retained: K.
        min_k: fewest tokens of a frame, in [1, N].

    Returns:
        The selection; scores rank tokens inside a frame.

    Raises:
        TypeError, ValueError: ``min_k`` is not an integer in [1, N].
    """
    frames, per_frame, _d = x.shape
    check_number("vcast", "min_k", min_k, 1, per_frame, whole=True)
    return _keep(x, num_retained, min_k if frames * min_k <= num_retained else 0)
