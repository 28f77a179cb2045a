"""Tango's rotated features, and what it makes of a set of tokens in them: salient members and context anchors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from score_vllm.methods.common import frame_blocks
from score_vllm.methods.merging import add_to_targets, density_peaks, squared_distances
from score_vllm.types import VideoGrid

NEIGHBOURS = 7
BASE_TIME, BASE_SPACE = 1e4, 1e3


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


def _peaks(z: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64: the density peaks of ``z`` [C, D], the highest first."""
    valid = torch.ones(1, len(z), dtype=torch.bool, device=z.device)
    at = torch.zeros(1, dtype=torch.int64, device=z.device)
    scores = density_peaks(z[None], at, valid, NEIGHBOURS, scale=1.0, count_self=False)[0]
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def salient(z: torch.Tensor, saliency: torch.Tensor, count: int, alpha: float) -> torch.Tensor:
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


def context(
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
