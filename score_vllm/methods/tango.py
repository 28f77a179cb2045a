"""Tango (repository xjtupanda/Tango) for Qwen2.5-VL: salient peaks and context clusters in rotated features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from score_vllm.methods import register
from score_vllm.methods import tango_clusters as clusters
from score_vllm.methods.common import (
    check_number,
    everything,
    masked_indices,
    ranks,
    saliency_or_norm,
    similarity_to_frames,
)
from score_vllm.methods.fastvid import frame_similarity
from score_vllm.methods.fastvid_plan import find_segments
from score_vllm.methods.holitom import best_windows, share_windows, static_counts, static_runs
from score_vllm.types import TokenSelection, VideoGrid

SEGMENT_TYPES = ("holitom", "fastvid")
# A place is static where every step is more similar than this, whatever tau cuts the segments.
STATIC_SIMILARITY = 0.8
MIN_SEGMENTS = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """``tau``: similarity that cuts segments; ``context_ratio``: share of merged tokens; ``alpha``: candidates per
    salient token; ``beta``: least weight of an anchor against its members; ``segment_type``: who cuts."""

    tau: float
    context_ratio: float
    alpha: float
    beta: float
    segment_type: str

    def __post_init__(self) -> None:
        check_number("tango", "tau", self.tau, -1, 1)
        check_number("tango", "context_ratio", self.context_ratio, 0, 1)
        check_number("tango", "alpha", self.alpha, 1, 100)
        check_number("tango", "beta", self.beta, 0, 1)
        if self.segment_type not in SEGMENT_TYPES:
            raise ValueError(
                f"option 'segment_type' of method 'tango' must be one of {SEGMENT_TYPES}, got {self.segment_type!r}"
            )


def _segments(x: torch.Tensor, s: Settings) -> list[tuple[int, int]]:
    """First and last frame of each segment."""
    if s.segment_type == "holitom":
        return best_windows(static_counts(static_runs(x, s.tau)))[0]
    return [(a, b - 1) for a, b in find_segments(frame_similarity(x, None), min(MIN_SEGMENTS, x.shape[0]), s.tau)]


def _static(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """[N] bool: the places of a segment that stay static; none in a segment of one frame."""
    a, b = window
    inside = x[a : b + 1]
    if a == b:
        return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    following = torch.arange(1, len(inside) + 1, device=x.device).clamp(max=len(inside) - 1)
    return (similarity_to_frames(inside, following)[:-1] > STATIC_SIMILARITY).all(0)


class _Segment:
    """One segment's tokens, and the pieces that are kept of them."""

    def __init__(self, x: torch.Tensor, z: torch.Tensor, saliency: torch.Tensor, s: Settings, mispaired: bool) -> None:
        self.x, self.z, self.saliency, self.s, self.mispaired = x, z, saliency, s, mispaired
        self.per_frame = x.shape[1]
        self.flat = x.reshape(-1, x.shape[-1])
        self.indices: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []

    def emit(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        self.indices.append(index)
        self.rows.append(rows.to(self.x.dtype))

    def split(self, count: int) -> tuple[int, int]:
        """How many of ``count`` tokens are salient, and how many context."""
        salient = int(count * (1 - self.s.context_ratio))
        return salient, count - salient

    def small_set(
        self, index: torch.Tensor, rows: torch.Tensor, z: torch.Tensor, saliency: torch.Tensor, count: int
    ) -> None:
        """Keep ``count`` of a set of tokens: [C] flat indices, [C, D] rows, [C, D] rotated, [C] saliency (step 3)."""
        if not count:
            return
        salient, context = self.split(count)
        left = torch.ones(len(z), dtype=torch.bool, device=z.device)
        if salient:
            own = clusters.salient(z, saliency, salient, self.s.alpha)
            left[own] = False
            self.emit(index[own], rows[own])
        if context:
            at = left.nonzero().flatten()
            anchors, merged = clusters.context(z[at], rows[at].float(), context, self.s.beta, self.mispaired)
            self.emit(index[at[anchors]], merged)

    def static_places(self, window: tuple[int, int], places: torch.Tensor, count: int) -> None:
        """Static places, averaged over the segment, at its first frame (step 2)."""
        a, b = window
        mean = torch.zeros(len(places), self.x.shape[-1], device=self.x.device)
        for t in range(a, b + 1):
            mean += self.x[t].index_select(0, places).float()
        saliency = self.saliency[a : b + 1, places].mean(0)
        self.small_set(a * self.per_frame + places, mean / (b - a + 1), self.z[a, places], saliency, count)

    def dynamic_places(self, window: tuple[int, int], places: torch.Tensor, counts: list[int]) -> None:
        """The other places: salient ones frame by frame, context over the whole segment (step 4)."""
        a, b = window
        if not len(places) or not sum(counts):
            return
        left = torch.ones(b - a + 1, len(places), dtype=torch.bool, device=self.x.device)
        context = 0
        for t, count in zip(range(a, b + 1), counts, strict=True):
            salient, more = self.split(count)
            context += more
            if salient:
                own = clusters.salient(self.z[t, places], self.saliency[t, places], salient, self.s.alpha)
                left[t - a, own] = False
                self.emit(t * self.per_frame + places[own], self.x[t, places[own]])
        if context:
            offsets = torch.arange(a, b + 1, device=self.x.device)[:, None] * self.per_frame + places
            index = offsets[left]
            z, rows = self.z.reshape(self.flat.shape)[index], self.flat[index].float()
            anchors, merged = clusters.context(z, rows, context, self.s.beta, self.mispaired)
            self.emit(index[anchors], merged)

    def selection(self) -> TokenSelection:
        index = torch.cat(self.indices)
        order = torch.sort(index, stable=True)
        rows = torch.cat(self.rows)[order.indices]
        return TokenSelection(order.values, rows, self.saliency.flatten(), *self.x.shape[:2])


def _tau(tau: float | None, ratio: float) -> float:
    return (0.65 if ratio <= 0.10 else 0.80) if tau is None else tau


def reference(
    x: torch.Tensor,
    retention_ratio: float,
    *,
    saliency: torch.Tensor | None = None,
    grid: VideoGrid | None = None,
    seconds: torch.Tensor | None = None,
    tau: float | None = None,
    context_ratio: float = 0.4,
    alpha: float = 1.5,
    beta: float = 0.6,
    segment_type: str = "holitom",
    **_: Any,
) -> TokenSelection:
    """Tango's part before the LLM as published, without the 1e-6 noise that breaks ties; its mispaired rows included.

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1]; small frames overshoot it, static videos stay below.
        saliency, grid, seconds: as in :func:`tango`.
        tau, context_ratio, alpha, beta, segment_type: see :class:`Settings`.

    Returns:
        The rows by ascending index.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    s = Settings(_tau(tau, retention_ratio), context_ratio, alpha, beta, segment_type)
    ranking = saliency_or_norm(x, saliency, "tango")
    z = clusters.rotated(x, grid, seconds)
    per_frame = x.shape[1]
    kept = _Segment(x, z, ranking, s, mispaired=True)
    everywhere = torch.arange(per_frame, device=x.device)
    for a, b in _segments(x, s):
        length = b - a + 1
        if length == 1:
            count = max(1, math.ceil(per_frame * retention_ratio))
            kept.small_set(a * per_frame + everywhere, x[a], z[a], ranking[a], count)
            continue
        static = _static(x, (a, b))
        fixed = int(static.sum())
        share = min(1.0, retention_ratio * length * per_frame / (length * per_frame - (length - 1) * fixed))
        if fixed:
            places = static.nonzero().flatten()
            kept.static_places((a, b), places, max(1, math.ceil(fixed * share)))
        moving = (~static).nonzero().flatten()
        kept.dynamic_places((a, b), moving, [math.ceil(len(moving) * share)] * length)
    return kept.selection()


@register("tango", reference=reference, saliency="frame")
def tango(
    x: torch.Tensor,
    num_retained: int,
    *,
    saliency: torch.Tensor | None = None,
    grid: VideoGrid | None = None,
    seconds: torch.Tensor | None = None,
    tau: float | None = None,
    context_ratio: float = 0.4,
    alpha: float = 1.5,
    beta: float = 0.6,
    segment_type: str = "holitom",
    **_: Any,
) -> TokenSelection:
    """Tango's part before the LLM at exactly K tokens, each merged row at its own anchor.

    Static and dynamic places share K as in ``holitom``: in proportion to their number, and above what merging leaves
    static tokens of later frames are kept raw, the most salient first.

    Args:
        x: [T, N, D].
        num_retained: K.
        saliency: [T, N]: FastVID's saliency for Qwen2.5-VL. None uses the L2 norm: NOT the published method.
        grid: T, rows, columns; None: one row of N columns.
        seconds: [T] of each cell on the source's clock; None: one second per cell.
        tau, context_ratio, alpha, beta, segment_type: see :class:`Settings`; tau None: 0.65 up to a ratio of 0.10,
            else 0.80.

    Returns:
        The selection, ascending. Scores are the saliency.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    ranking = saliency_or_norm(x, saliency, "tango")
    frames, per_frame, d = x.shape
    s = Settings(_tau(tau, num_retained / ranking.numel()), context_ratio, alpha, beta, segment_type)
    if num_retained == ranking.numel():
        return everything(x)
    z = clusters.rotated(x, grid, seconds)
    windows = _segments(x, s)
    static = [_static(x, window) for window in windows]
    plan = share_windows(windows, [int(mask.sum()) for mask in static], per_frame, num_retained)
    kept = _Segment(x, z, ranking, s, mispaired=False)
    copyable = torch.zeros(frames, per_frame, dtype=torch.bool, device=x.device)
    for (a, b), mask, count in zip(windows, static, plan.centres, strict=True):
        copyable[a + 1 : b + 1] = mask
        if count:
            kept.static_places((a, b), mask.nonzero().flatten(), count)
        if a == b:
            index = a * per_frame + torch.arange(per_frame, device=x.device)
            kept.small_set(index, x[a], z[a], ranking[a], plan.dynamic[a])
        else:
            kept.dynamic_places((a, b), (~mask).nonzero().flatten(), plan.dynamic[a : b + 1])
    if plan.copies:
        left = ranking.masked_fill(~copyable, -torch.inf).flatten()
        own = masked_indices(ranks(left, descending=True) < plan.copies, plan.copies)
        kept.emit(own, x.reshape(-1, d)[own])
    return kept.selection()
