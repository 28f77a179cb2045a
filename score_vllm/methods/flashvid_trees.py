"""FlashVID's steps on a segment: diverse salient tokens, trees over time, clusters of what is left."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from score_vllm.methods.common import masked_indices, ranks
from score_vllm.methods.merging import add_to_targets, density_peaks, squared_distances

NEIGHBOURS = 7
ATTENTION_SCALE = 1e6


def diverse_salient(
    x: torch.Tensor, saliency: torch.Tensor, relevance: torch.Tensor | None, counts: list[int]
) -> torch.Tensor:
    """Tokens of a segment's frames that are salient and unlike each other (FlashVID, step 2).

    Args:
        x: [L, N, D].
        saliency: [L, N].
        relevance: [L, N] to the segment's mean tokens, or None.
        counts: how many of each frame, at most N.

    Returns:
        [L, N] bool.
    """
    frames, per_frame, _d = x.shape
    picked = torch.zeros(frames, per_frame, dtype=torch.bool, device=x.device)
    weight = ATTENTION_SCALE * saliency
    if relevance is not None:
        weight = weight * relevance
    for t, count in enumerate(counts):
        if not count:
            continue
        unit = F.normalize(x[t].float(), dim=-1)
        costs = (1 - unit @ unit.T) * weight[t]
        second = costs.topk(2, dim=0, largest=False).values[1] if per_frame > 1 else costs[0]
        chosen = second.argmax()
        nearest = torch.full((per_frame,), torch.inf, device=x.device)
        for _ in range(count):
            picked[t, chosen] = True
            nearest = torch.minimum(nearest, costs[chosen])
            chosen = nearest.masked_fill(picked[t], -torch.inf).argmax()
    return picked


def grow_trees(
    x: torch.Tensor, picked: torch.Tensor, threshold: float, most_linked: int, count_descendants: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge tokens of a segment into their best match one frame before (FlashVID, step 3).

    Args:
        x: [L, N, D], L > 1.
        picked: [L, N] bool: neither linked nor linked to.
        threshold: cosine above which a token is linked.
        most_linked: at most this many tokens, those of highest cosine.
        count_descendants: a linked token brings its whole tree's count with it, so that a row is the mean of its
            tree. The published code counts direct children only, and long trees grow far beyond any token.

    Returns:
        ``(rows, left)``: [L, N, D] fp32 merged rows, and [L, N] bool: neither linked nor picked.
    """
    frames, per_frame, _d = x.shape
    best = torch.full((frames, per_frame), -1.0, device=x.device)
    to = torch.zeros(frames, per_frame, dtype=torch.int64, device=x.device)
    before = F.normalize(x[0].float(), dim=-1)
    for t in range(1, frames):
        unit = F.normalize(x[t].float(), dim=-1)
        similarity = (unit @ before.T).masked_fill(picked[t][:, None] | picked[t - 1][None], -1.0)
        best[t], to[t] = similarity.max(dim=-1)
        before = unit
    linked = (best > threshold) & (best > -1)
    if int(linked.sum()) > most_linked:
        cut = torch.sort(best.flatten(), descending=True, stable=True).values[most_linked - 1] if most_linked else 2.0
        linked = best > max(float(cut), -1 + 1e-6)
    rows = x.float().clone()
    counts = torch.ones(frames, per_frame, dtype=torch.int64, device=x.device)
    for t in range(frames - 1, -1, -1):
        ends = ~linked[t]
        rows[t][ends] = rows[t][ends] / counts[t][ends, None]
        if t and bool(linked[t].any()):
            mine, target = linked[t].nonzero().flatten(), to[t][linked[t]]
            received = torch.zeros(per_frame, dtype=torch.int64, device=x.device)
            add_to_targets(rows[t][mine], target, rows[t - 1], received)
            if count_descendants:
                received = torch.zeros_like(received).index_add_(0, target, counts[t][mine])
            counts[t - 1] += received
    return rows, ~linked & ~picked


def spatial_clusters(rows: torch.Tensor, left: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what is left of one frame into clusters (FlashVID, step 4).

    Args:
        rows: [N, D] fp32.
        left: [N] bool.
        count: clusters, at most the number left.

    Returns:
        ``(n, merged)``: [count] int64 ascending and [count, D] fp32.
    """
    at = torch.zeros(1, dtype=torch.int64, device=rows.device)
    peaks = density_peaks(rows[None], at, left[None], min(count, NEIGHBOURS))[0]
    is_centre = ranks(peaks, descending=True) < count
    centres = masked_indices(is_centre, count)
    members = left.nonzero().flatten()
    shift = rows[members].mean(0)
    nearest = squared_distances((rows[members] - shift)[None], (rows[centres] - shift)[None])[0].argmin(-1)
    own = torch.searchsorted(centres, members).clamp(max=count - 1)
    nearest = torch.where(centres[own] == members, own, nearest)
    sums = torch.zeros(count, rows.shape[1], device=rows.device)
    sizes = torch.zeros(count, dtype=torch.int64, device=rows.device)
    add_to_targets(rows[members], nearest, sums, sizes)
    return centres, sums / sizes[:, None]
