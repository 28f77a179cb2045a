"""HoliTom (arXiv 2505.21334), the part before the LLM: windows of static places, merged over time and space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from score_vllm.methods import register
from score_vllm.methods.common import (
    check_number,
    everything,
    frame_blocks,
    masked_indices,
    proportional_share,
    ranks,
    saliency_or_norm,
    similarity_to_frames,
)
from score_vllm.methods.merging import add_to_targets, density_peaks, squared_distances
from score_vllm.types import TokenSelection

MAX_WINDOW = 1024


@dataclass(slots=True)
class Plan:
    """Windows (first frame, last frame), their static places, and what is kept of both kinds.

    ``statics`` and ``centres`` are per window, ``dynamic`` per frame. ``copies`` static tokens of other than
    a window's first frame are kept raw besides.
    """

    windows: list[tuple[int, int]]
    statics: list[int]
    centres: list[int]
    dynamic: list[int]
    copies: int = 0


def static_runs(x: torch.Tensor, tau: float) -> torch.Tensor:
    """[T, N] int64: over how many next frames a place stays static, cosine > tau each time (HoliTom, step 1)."""
    frames = x.shape[0]
    t = torch.arange(frames, device=x.device)
    following = (t + 1).clamp(max=frames - 1)
    moves = similarity_to_frames(x, following) <= tau
    moves[-1] = True
    # The next frame after which the place moves, from the end of the video backwards.
    breaks = torch.where(moves, t[:, None], frames - 1).flip(0).cummin(0).values.flip(0)
    return breaks - t[:, None]


def static_counts(runs: torch.Tensor) -> np.ndarray:
    """[T, T] on the host: how many places stay static from frame ``a`` over the next ``w`` frames; one sync."""
    frames = runs.shape[0]
    ends = torch.zeros(frames, frames, dtype=torch.int64, device=runs.device)
    ends.scatter_add_(1, runs, torch.ones_like(runs))
    return ends.flip(1).cumsum(1).flip(1).cpu().numpy()


def best_windows(counts: np.ndarray) -> tuple[list[tuple[int, int]], int]:
    """Cut the video into the windows of highest total gain (HoliTom, step 2).

    Args:
        counts: [T, T] of :func:`static_counts`; a window a..b gains ``counts[a, b - a] * (b - a)``.

    Returns:
        The windows in order, and their total gain. Ties: a window of one frame, then the shortest.
    """
    frames = counts.shape[0]
    best = np.zeros(frames + 1, dtype=np.int64)
    length = np.ones(frames + 1, dtype=np.int64)
    for stop in range(1, frames + 1):
        sizes = np.arange(1, min(stop, MAX_WINDOW) + 1)
        starts = stop - sizes
        totals = best[starts] + counts[starts, sizes - 1] * (sizes - 1)
        length[stop] = sizes[totals.argmax()]
        best[stop] = totals.max()
    windows, stop = [], frames
    while stop:
        windows.append((int(stop - length[stop]), int(stop - 1)))
        stop -= int(length[stop])
    return windows[::-1], int(best[frames])


def _statics(counts: np.ndarray, windows: list[tuple[int, int]]) -> list[int]:
    return [int(counts[a, b - a]) if b > a else 0 for a, b in windows]


def plan_reference(counts: np.ndarray, per_frame: int, ratio: float) -> Plan:
    """The published counts (HoliTom, steps 3, 5 and 6), in fp32 as its code has them."""
    windows, gain = best_windows(counts)
    total = counts.shape[0] * per_frame
    adjusted = min(np.float32(1), np.float32(ratio * total) / np.float32(total - gain))
    statics = _statics(counts, windows)
    dynamic = [
        math.ceil(np.float32(per_frame - fixed) * adjusted)
        for fixed, (a, b) in zip(statics, windows, strict=True)
        for _ in range(b - a + 1)
    ]
    return Plan(windows, statics, [round(float(np.float32(fixed) * adjusted)) for fixed in statics], dynamic)


def plan_exact(counts: np.ndarray, per_frame: int, num_retained: int) -> Plan:
    """Counts that sum to exactly K: the published shares, with cumulative rounding in place of its ceil and round."""
    windows, _gain = best_windows(counts)
    return share_windows(windows, _statics(counts, windows), per_frame, num_retained)


def share_windows(windows: list[tuple[int, int]], statics: list[int], per_frame: int, num_retained: int) -> Plan:
    """Share K over static places (once per window) and dynamic ones (frame by frame), in proportion to their number.

    Args:
        windows: first and last frame of each.
        statics: static places of each; 0 for windows of one frame.
        per_frame: N.
        num_retained: K.

    Returns:
        The plan; what passes the number of places becomes ``copies``.
    """
    capacities = []
    for fixed, (a, b) in zip(statics, windows, strict=True):
        capacities += [fixed] + [per_frame - fixed] * (b - a + 1)
    fits = sum(capacities)
    shares = proportional_share(min(num_retained, fits), capacities)
    plan = Plan(windows, statics, [], [], max(0, num_retained - fits))
    at = 0
    for a, b in windows:
        plan.centres.append(shares[at])
        plan.dynamic += shares[at + 1 : at + 2 + b - a]
        at += 2 + b - a
    return plan


def _merge_window(
    x: torch.Tensor, window: tuple[int, int], places: torch.Tensor, kept: int, neighbours: int, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``kept`` centres of a window's static places, and their rows (HoliTom, steps 4 and 6).

    Args:
        x: [T, N, D].
        window: first and last frame.
        places: [S] int64 ascending: the static n.
        kept: how many centres, 1 to S.
        neighbours: K of the density.
        beta: weight of the centre against the mean of its members.

    Returns:
        ``(n, rows)``: [kept] int64 ascending and [kept, D] fp32.
    """
    first, last = window
    means = torch.zeros(len(places), x.shape[-1], dtype=torch.float32, device=x.device)
    inside = x[first : last + 1]
    for start, stop in frame_blocks(inside):
        means += inside[start:stop].index_select(1, places).float().sum(dim=0)
    means /= last - first + 1
    everyone = torch.ones(1, len(places), dtype=torch.bool, device=x.device)
    alone = torch.zeros(1, dtype=torch.int64, device=x.device)
    peaks = density_peaks(means[None], alone, everyone, min(neighbours, kept))[0]
    is_centre = ranks(peaks, descending=True) < kept
    centres = masked_indices(is_centre, kept)
    chosen = means[centres]
    shift = means.mean(dim=0)
    nearest = squared_distances((means - shift)[None], (chosen - shift)[None])[0].argmin(dim=-1)
    sums, counts = torch.zeros_like(chosen), torch.zeros(kept, dtype=torch.int64, device=x.device)
    add_to_targets(means, nearest.masked_fill(is_centre, kept), sums, counts)
    mixed = beta * chosen + (1 - beta) * sums / counts.clamp(min=1)[:, None]
    return places[centres], torch.where(counts[:, None] > 0, mixed, chosen)


def _carry_out(
    x: torch.Tensor, runs: torch.Tensor, ranking: torch.Tensor, plan: Plan, neighbours: int, beta: float
) -> TokenSelection:
    """Keep and merge what the plan says, in the published order: per window static places, then frame by frame."""
    frames, per_frame, d = x.shape
    lengths = [b - a + 1 for a, b in plan.windows]
    first = torch.tensor(
        [a for (a, _b), n in zip(plan.windows, lengths, strict=True) for _ in range(n)], device=x.device
    )
    span = torch.tensor([n - 1 for n in lengths for _ in range(n)], device=x.device)
    static = (runs[first] >= span[:, None]) & (span > 0)[:, None]
    limits = torch.tensor(plan.dynamic, device=x.device)
    raw = (ranks(ranking.masked_fill(static, -torch.inf), descending=True) < limits[:, None]) & ~static
    flat = x.reshape(-1, d)

    indices, rows = [], []
    for (a, b), fixed, kept in zip(plan.windows, plan.statics, plan.centres, strict=True):
        if kept:
            places, merged = _merge_window(x, (a, b), masked_indices(static[a], fixed), kept, neighbours, beta)
            indices.append(a * per_frame + places)
            rows.append(merged.to(x.dtype))
        own = a * per_frame + masked_indices(raw[a : b + 1], sum(plan.dynamic[a : b + 1]))
        indices.append(own)
        rows.append(flat[own])
    if plan.copies:
        copyable = static & (torch.arange(frames, device=x.device) > first)[:, None]
        left = ranking.masked_fill(~copyable, -torch.inf).flatten()
        own = masked_indices(ranks(left, descending=True) < plan.copies, plan.copies)
        indices.append(own)
        rows.append(flat[own])
    return TokenSelection(torch.cat(indices), torch.cat(rows), ranking.flatten(), frames, per_frame)


def _check(tau: float | None, beta: float, neighbours: int, ratio: float, variant: str) -> float:
    if tau is None:
        tau = 0.65 if variant == "official" and ratio <= 0.10 else 0.80
    check_number("holitom", "tau", tau, -1, 1)
    check_number("holitom", "beta", beta, 0, 1)
    check_number("holitom", "K", neighbours, 1, 2**31, whole=True)
    return tau


def reference(
    x: torch.Tensor,
    retention_ratio: float,
    *,
    variant: str = "official",
    saliency: torch.Tensor | None = None,
    tau: float | None = None,
    beta: float = 0.6,
    K: int = 7,
    **_: Any,
) -> TokenSelection:
    """HoliTom as published, without merging inside the LLM and without the 1e-6 noise that breaks ties.

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1]; small frames overshoot it, static videos stay below.
        variant: ``official``: a merged token stands at ``first frame of its window * N + n``. ``port``:
            VidCom2's port to Qwen-VL: tau 0.8 always, and indices ``linspace(0, T * N - 1, count)``,
            which have nothing to do with the rows.
        saliency, tau, beta, K: as in :func:`holitom`.

    Returns:
        The rows in the order that the published code emits them.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    tau = _check(tau, beta, K, retention_ratio, variant)
    ranking = saliency_or_norm(x, saliency, "holitom")
    runs = static_runs(x, tau)
    plan = plan_reference(static_counts(runs), x.shape[1], retention_ratio)
    selection = _carry_out(x, runs, ranking, plan, K, beta)
    if variant == "port":
        places = torch.linspace(0, ranking.numel() - 1, selection.num_retained, device=x.device).long()
        return TokenSelection(places, selection.embeddings, selection.scores, *x.shape[:2])
    return selection


@register("holitom", reference=reference, variants=("official", "port"), saliency="frame")
def holitom(
    x: torch.Tensor,
    num_retained: int,
    *,
    variant: str = "official",
    saliency: torch.Tensor | None = None,
    tau: float | None = None,
    beta: float = 0.6,
    K: int = 7,
    **_: Any,
) -> TokenSelection:
    """HoliTom (arXiv 2505.21334), without merging inside the LLM, at exactly K tokens.

    Windows and the shares of static and dynamic tokens are the published ones, rounded so that they sum to the
    budget. Above what merging leaves, where the published count saturates, static tokens of a window's later
    frames are kept raw besides, the most salient first. With the whole budget all is returned unchanged.

    Args:
        x: [T, N, D].
        num_retained: the number of tokens to keep.
        variant: ``official`` or ``port``, which differ here in the default of tau only.
        saliency: [T, N]: the last kept vision layer's attention, averaged over heads and queries and pooled
            like the features. None uses the L2 norm: NOT the published method.
        tau: cosine above which a place is static; None: 0.65 up to a ratio of 0.10, else 0.80 (``port``
            always 0.80).
        beta: weight of a centre against the mean of what it absorbs.
        K: neighbours that make a density.

    Returns:
        The selection, ascending; a merged row stands at its place in the first frame of its window. Scores
        are the saliency.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    ranking = saliency_or_norm(x, saliency, "holitom")
    total = ranking.numel()
    tau = _check(tau, beta, K, num_retained / total, variant)
    if num_retained == total:
        return everything(x)
    runs = static_runs(x, tau)
    plan = plan_exact(static_counts(runs), x.shape[1], num_retained)
    emitted = _carry_out(x, runs, ranking, plan, K, beta)
    order = emitted.indices.sort().indices
    return TokenSelection(emitted.indices[order], emitted.embeddings[order], emitted.scores, *x.shape[:2])
