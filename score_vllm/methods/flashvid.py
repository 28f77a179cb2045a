"""FlashVID (repository Fanziyang-v/FlashVID), the part before the LLM: diverse salient tokens, trees over time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.methods import register
from score_vllm.methods.common import (
    check_number,
    even_share,
    everything,
    frame_blocks,
    masked_indices,
    proportional_share,
    ranks,
    saliency_or_norm,
)
from score_vllm.methods.merging import add_to_targets, density_peaks, squared_distances
from score_vllm.types import TokenSelection

NEIGHBOURS = 7
# Fewest segments of each variant.
MIN_SEGMENTS = {"qwen": 4, "llava": 8}
ATTENTION_SCALE = 1e6


@dataclass(frozen=True, slots=True)
class Settings:
    """``alpha``: share of a frame's budget that is kept raw; ``temporal_threshold``: cosine above which a token joins
    its best match one frame before; ``segment_threshold``: cut below this similarity of mean tokens;
    ``min_segment_num``: fewest segments; ``do_segment``: False makes the video one segment."""

    alpha: float
    temporal_threshold: float
    segment_threshold: float
    min_segment_num: int
    do_segment: bool

    def __post_init__(self) -> None:
        check_number("flashvid", "alpha", self.alpha, 0, 1)
        check_number("flashvid", "temporal_threshold", self.temporal_threshold, -1, 1)
        check_number("flashvid", "segment_threshold", self.segment_threshold, -1, 1)
        check_number("flashvid", "min_segment_num", self.min_segment_num, 1, 2**31, whole=True)


def find_segments(x: torch.Tensor, s: Settings) -> list[tuple[int, int]]:
    """Half-open frame ranges: cut at similarities below the threshold, then at the smallest others until there are
    ``min_segment_num`` segments (FlashVID, step 1)."""
    frames = x.shape[0]
    if not s.do_segment:
        return [(0, frames)]
    means = torch.cat([x[start:stop].float().mean(dim=1) for start, stop in frame_blocks(x)])
    units = means / means.norm(dim=-1, keepdim=True)
    similarity = (units[1:] * units[:-1]).sum(-1).tolist()
    cuts = {t for t, value in enumerate(similarity) if value < s.segment_threshold}
    others = sorted((t for t in range(frames - 1) if t not in cuts), key=similarity.__getitem__)
    cuts |= set(others[: max(0, s.min_segment_num - len(cuts) - 1)])
    return list(itertools.pairwise([0, *(t + 1 for t in sorted(cuts)), frames]))


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


def _relevance(x: torch.Tensor, variant: str) -> torch.Tensor | None:
    """[L, N]: mean product of each token with the segment's mean tokens; None for ``qwen``."""
    if variant == "qwen":
        return None
    means = x.float().mean(dim=1)
    return torch.stack([(frame.float() @ means.T).mean(-1) for frame in x])


def _assemble(
    x: torch.Tensor, saliency: torch.Tensor, pieces: list[tuple[torch.Tensor, torch.Tensor]]
) -> TokenSelection:
    indices = torch.cat([index for index, _rows in pieces])
    rows = torch.cat([rows.to(x.dtype) for _index, rows in pieces])
    order = torch.sort(indices, stable=True)
    return TokenSelection(order.values, rows[order.indices], saliency.flatten(), *x.shape[:2])


def reference(
    x: torch.Tensor,
    retention_ratio: float,
    *,
    variant: str = "qwen",
    saliency: torch.Tensor | None = None,
    expansion: float = 1.25,
    alpha: float = 0.7,
    temporal_threshold: float = 0.8,
    segment_threshold: float = 0.9,
    min_segment_num: int | None = None,
    do_segment: bool = True,
    **_: Any,
) -> TokenSelection:
    """FlashVID's outer part as published, without the 1e-6 noise that breaks ties; defects included.

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1].
        variant: ``qwen`` or ``llava``: fewest segments, and what ranks tokens.
        saliency: as in :func:`flashvid`.
        expansion: surplus that the published method removes again inside the LLM; 1 for the outer part alone.
        alpha, temporal_threshold, segment_threshold, min_segment_num, do_segment: see :class:`Settings`.

    Returns:
        The rows by index; an index may stand twice, and rows of long trees are sums rather than means.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the published code fails on this input.
    """
    fewest = MIN_SEGMENTS[variant] if min_segment_num is None else min_segment_num
    s = Settings(alpha, temporal_threshold, segment_threshold, fewest, do_segment)
    check_number("flashvid", "expansion", expansion, 0.01, 100)
    ranking = saliency_or_norm(x, saliency, "flashvid")
    per_frame, d = x.shape[1:]
    budget = math.ceil(per_frame * retention_ratio * expansion)
    raw = math.ceil(budget * alpha)
    merged = budget - raw
    if merged and temporal_threshold >= 1:
        raise ValueError(
            f"temporal_threshold of method 'flashvid' in reference mode must be < 1, got {temporal_threshold}: "
            "its code divides by zero there"
        )
    pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start, stop in find_segments(x, s):
        part, length, first = x[start:stop], stop - start, start * per_frame
        picked = diverse_salient(part, ranking[start:stop], _relevance(part, variant), [min(raw, per_frame)] * length)
        own = picked.flatten().nonzero().flatten()
        pieces.append((first + own, part.reshape(-1, d)[own]))
        if surplus := max(0, raw - per_frame):
            # Every token is picked: the published loop takes the first one again and again.
            again = first + per_frame * torch.arange(length, device=x.device).repeat_interleave(surplus)
            pieces.append((again, x.reshape(-1, d)[again]))
        if not merged:
            continue
        if length == 1:
            rows, left = part.float(), torch.ones_like(picked)
        else:
            most = length * per_frame - budget * length
            if most < 1:
                raise ValueError(
                    f"method 'flashvid' in reference mode cannot keep {budget} of N={per_frame} tokens of a frame: "
                    "its code fails there; use mode='exact'"
                )
            rows, left = grow_trees(part, picked, temporal_threshold, most, count_descendants=False)
        number = int(left.sum())
        if not number:
            raise ValueError("method 'flashvid' in reference mode divides by zero: no token is left to merge")
        share = merged * length / number
        for t in range(length):
            count = int(left[t].sum())
            if share >= 1:
                n = left[t].nonzero().flatten()
                pieces.append((first + t * per_frame + n, rows[t][n]))
            elif count:
                n, means = spatial_clusters(rows[t], left[t], math.ceil(count * share))
                pieces.append((first + t * per_frame + n, means))
    return _assemble(x, ranking, pieces)


@register("flashvid", reference=reference, variants=tuple(MIN_SEGMENTS), saliency="patch")
def flashvid(
    x: torch.Tensor,
    num_retained: int,
    *,
    variant: str = "qwen",
    saliency: torch.Tensor | None = None,
    alpha: float = 0.7,
    temporal_threshold: float = 0.8,
    segment_threshold: float = 0.9,
    min_segment_num: int | None = None,
    do_segment: bool = True,
    **_: Any,
) -> TokenSelection:
    """FlashVID's part before the LLM at exactly K tokens.

    Frames share K evenly; of each frame's share ``alpha`` is kept raw. The rest of a segment's share goes to its
    frames by how many tokens their trees leave. Against the published code: a merged row is the mean of its whole
    tree, no index stands twice, a negative relevance counts as 0, and the count follows K, not the content.

    Args:
        x: [T, N, D].
        num_retained: K.
        variant: ``qwen`` or ``llava``.
        saliency: [T, N]: attention of every patch query in the last vision block, averaged over heads and queries
            and over the patches of a token. None uses the L2 norm: NOT the published method.
        alpha, temporal_threshold, segment_threshold, min_segment_num, do_segment: see :class:`Settings`.

    Returns:
        The selection, ascending; a merged row stands at its centre's index. Scores are the saliency.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    fewest = MIN_SEGMENTS[variant] if min_segment_num is None else min_segment_num
    s = Settings(alpha, temporal_threshold, segment_threshold, fewest, do_segment)
    ranking = saliency_or_norm(x, saliency, "flashvid")
    frames, per_frame, d = x.shape
    if num_retained == ranking.numel():
        return everything(x)
    budgets = even_share(num_retained, frames)
    pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start, stop in find_segments(x, s):
        part, first, shares = x[start:stop], start * per_frame, budgets[start:stop]
        raw = [math.ceil(share * alpha) for share in shares]
        relevance = _relevance(part, variant)
        picked = diverse_salient(part, ranking[start:stop], None if relevance is None else relevance.clamp(min=0), raw)
        own = masked_indices(picked, sum(raw))
        pieces.append((first + own, part.reshape(-1, d)[own]))
        merged = sum(shares) - sum(raw)
        if not merged:
            continue
        rows, left = part.float(), ~picked
        if len(shares) > 1:
            most = len(shares) * per_frame - sum(shares)
            rows, left = grow_trees(part, picked, temporal_threshold, most, count_descendants=True)
        for t, count in enumerate(proportional_share(merged, left.sum(1).tolist())):
            if count:
                n, means = spatial_clusters(rows[t], left[t], count)
                pieces.append((first + t * per_frame + n, means))
    return _assemble(x, ranking, pieces)
