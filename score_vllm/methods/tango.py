"""Tango (repository xjtupanda/Tango) for Qwen2.5-VL: salient peaks and context clusters in rotated features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from score_vllm.methods import register
from score_vllm.methods.common import (
    check_number,
    everything,
    frame_blocks,
    masked_indices,
    ranks,
    saliency_or_norm,
    similarity_to_frames,
)
from score_vllm.methods.fastvid import frame_similarity
from score_vllm.methods.fastvid_plan import find_segments
from score_vllm.methods.holitom import best_windows, share_windows, static_counts, static_runs
from score_vllm.methods.merging import add_to_targets, density_peaks, squared_distances
from score_vllm.types import TokenSelection, VideoGrid

SEGMENT_TYPES = ("holitom", "fastvid")
NEIGHBOURS = 7
# A place is static where every step is more similar than this, whatever tau cuts the segments.
STATIC_SIMILARITY = 0.8
MIN_SEGMENTS = 8
BASE_TIME, BASE_SPACE = 1e4, 1e3


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


def cell_seconds(times: np.ndarray, cells: int) -> np.ndarray:
    """[T] float64: time of each cell, interpolated over the times [F] of the frames as Tango's code does."""
    places = np.linspace(0, len(times) - 1, cells)
    return np.interp(places, np.arange(len(times)), times)


def rotated(x: torch.Tensor, grid: VideoGrid | None, seconds: torch.Tensor | None) -> torch.Tensor:
    """[T, N, D] float32: unit tokens, rotated by their second, row and column (Tango, roped features).

    Rows and columns take ``2 * (D // 6)`` channels each, time the rest; of an odd number the last is not rotated.

    Args:
        x: [T, N, D].
        grid: T, rows, columns; None: one row of N.
        seconds: [T]; None: one second per cell.
    """
    frames, per_frame, d = x.shape
    device = x.device
    columns = grid.w if grid else per_frame
    n = torch.arange(per_frame, device=device)
    clock = torch.arange(frames, device=device) if seconds is None else seconds.to(device)
    space = 2 * (d // 6)
    out = torch.empty(x.shape, dtype=torch.float32, device=device)

    def turn(part: torch.Tensor, position: torch.Tensor, base: float) -> torch.Tensor:
        half = part.shape[-1] // 2
        exponent = torch.arange(half, device=device, dtype=torch.float32) * 2 / max(1, 2 * half)
        angle = position.float()[..., None] * base**-exponent
        a, b, rest = part[..., :half], part[..., half : 2 * half], part[..., 2 * half :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)

    for start, stop in frame_blocks(x):
        unit = F.normalize(x[start:stop].float(), dim=-1)
        time, row, column = unit.split([d - 2 * space, space, space], dim=-1)
        parts = [
            turn(time, clock[start:stop, None].expand(-1, per_frame), BASE_TIME),
            turn(row, (n // columns).expand(stop - start, -1), BASE_SPACE),
            turn(column, (n % columns).expand(stop - start, -1), BASE_SPACE),
        ]
        out[start:stop] = torch.cat(parts, dim=-1)
    return out


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


def _peaks(z: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64: the density peaks of ``z`` [C, D], the highest first."""
    valid = torch.ones(1, len(z), dtype=torch.bool, device=z.device)
    at = torch.zeros(1, dtype=torch.int64, device=z.device)
    scores = density_peaks(z[None], at, valid, NEIGHBOURS, scale=1.0, count_self=False)[0]
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def _salient(z: torch.Tensor, saliency: torch.Tensor, count: int, alpha: float) -> torch.Tensor:
    """[count] int64: the most salient member of each of ``count`` clusters of the most salient tokens (step 3)."""
    number = min(int(alpha * count), len(z))
    candidates = torch.sort(saliency, descending=True, stable=True).indices[:number]
    if number <= count:
        return candidates
    peaks = _peaks(z[candidates], count)
    nearest = squared_distances(z[candidates][None], z[candidates[peaks]][None])[0].argmin(-1)
    # Candidates stand by saliency, so a cluster's most salient member is its first.
    first = torch.full((count,), number, device=z.device)
    first.scatter_reduce_(0, nearest, torch.arange(number, device=z.device), "amin")
    return candidates[torch.where(first < number, first, peaks)]


def _context(
    z: torch.Tensor, rows: torch.Tensor, count: int, beta: float, mispaired: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors among the tokens that are left, and what each becomes (step 3).

    Args:
        z: [C, D] rotated.
        rows: [C, D] fp32.
        count: anchors; C or more keeps all as they are.
        beta: least weight of the anchor.
        mispaired: rows in ascending order of the anchors at the anchors' order by score, as the published code has it.

    Returns:
        ``(anchors, merged)``: [count] int64 into z, and [count, D].
    """
    if count >= len(z):
        return torch.arange(len(z), device=z.device), rows
    peaks = _peaks(z, count)
    anchors = peaks.sort().values
    shift = z.mean(0)
    nearest = squared_distances((z - shift)[None], (z[anchors] - shift)[None])[0].argmin(-1)
    sums = torch.zeros(count, rows.shape[1], device=z.device)
    sizes = torch.zeros(count, dtype=torch.int64, device=z.device)
    add_to_targets(rows, nearest, sums, sizes)
    weight = (1.0 / sizes.clamp(min=1)).clamp(min=beta)[:, None]
    mean = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], rows[anchors])
    merged = weight * rows[anchors] + (1 - weight) * mean
    return (peaks if mispaired else anchors), merged


class _Segment:
    """One segment's tokens, and the pieces that are kept of them."""

    def __init__(self, x: torch.Tensor, z: torch.Tensor, saliency: torch.Tensor, s: Settings, mispaired: bool) -> None:
        self.x, self.z, self.saliency, self.s, self.mispaired = x, z, saliency, s, mispaired
        self.per_frame = x.shape[1]
        self.flat = x.reshape(-1, x.shape[-1])
        self.indices: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []

    def _emit(self, index: torch.Tensor, rows: torch.Tensor) -> None:
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
            own = _salient(z, saliency, salient, self.s.alpha)
            left[own] = False
            self._emit(index[own], rows[own])
        if context:
            at = left.nonzero().flatten()
            anchors, merged = _context(z[at], rows[at].float(), context, self.s.beta, self.mispaired)
            self._emit(index[at[anchors]], merged)

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
                own = _salient(self.z[t, places], self.saliency[t, places], salient, self.s.alpha)
                left[t - a, own] = False
                self._emit(t * self.per_frame + places[own], self.x[t, places[own]])
        if context:
            offsets = torch.arange(a, b + 1, device=self.x.device)[:, None] * self.per_frame + places
            index = offsets[left]
            z, rows = self.z.reshape(self.flat.shape)[index], self.flat[index].float()
            anchors, merged = _context(z, rows, context, self.s.beta, self.mispaired)
            self._emit(index[anchors], merged)

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
    z = rotated(x, grid, seconds)
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
    z = rotated(x, grid, seconds)
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
        kept._emit(own, x.reshape(-1, d)[own])
    return kept.selection()
