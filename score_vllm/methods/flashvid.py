"""FlashVID (repository Fanziyang-v/FlashVID), the part before the LLM: diverse salient tokens, trees over time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from score_vllm.methods import register
from score_vllm.methods.common import (
    check_number,
    even_share,
    everything,
    frame_blocks,
    masked_indices,
    proportional_share,
    saliency_or_norm,
)
from score_vllm.methods.flashvid_trees import diverse_salient, grow_trees, spatial_clusters
from score_vllm.types import TokenSelection

# Fewest segments of each variant.
MIN_SEGMENTS = {"qwen": 4, "llava": 8}


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
