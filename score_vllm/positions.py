"""Exact multi-axis rotary (M-RoPE) positions of kept tokens, and their passage through bf16 rows.

A video starts at one base position of the prompt; each of its tokens stands at ``base + (t, h, w)``. The
base, all text and the decode delta are known before the vision tower runs, whatever is kept. Only the
offsets ``(t, h, w)`` of the kept tokens are not, so they travel with the rows, as base-256 digits: whole
numbers below 256 are exact in bf16 and fp16 where larger ones are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from score_vllm.types import VideoGrid

AXES = 3
DIGITS = 3
POSITION_CHANNELS = AXES * DIGITS
MAX_OFFSET = 256**DIGITS - 1


def temporal_offsets(num_cells: int, t_factor: float) -> np.ndarray:
    """Temporal offset of each cell: ``floor(cell * t_factor)``.

    Args:
        num_cells: T.
        t_factor: positions per cell: seconds per cell times tokens per second (Qwen2.5-VL report, M-RoPE
            aligned to absolute time). Computed in float64, as vLLM does.

    Returns:
        [T] int64.

    Raises:
        ValueError: ``t_factor`` is negative or not finite, or an offset is beyond what the channels carry.
    """
    if not np.isfinite(t_factor) or t_factor < 0:
        raise ValueError(f"t_factor must be a finite number >= 0, got {t_factor!r}")
    offsets = (np.arange(num_cells) * t_factor).astype(np.int64)
    if offsets[-1] > MAX_OFFSET:
        raise ValueError(f"temporal offset {offsets[-1]} is above {MAX_OFFSET}: the video is too long")
    return offsets


def video_offsets(grid: VideoGrid, t_factor: float) -> torch.Tensor:
    """Offset of every token of a video from the video's base position.

    Args:
        grid: T, rows, columns.
        t_factor: see :func:`temporal_offsets`.

    Returns:
        [T * N, 3] int64, columns (t, h, w), in the order of the flat token index.
    """
    t = torch.from_numpy(temporal_offsets(grid.t, t_factor))
    h, w = torch.arange(grid.h), torch.arange(grid.w)
    return torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1).reshape(-1, AXES)


def position_extent(grid: VideoGrid, t_factor: float) -> int:
    """How far a video advances the positions of what follows it: its largest offset plus one."""
    return max(int(temporal_offsets(grid.t, t_factor)[-1]), grid.h - 1, grid.w - 1) + 1


def pack_offsets(offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write offsets as base-256 digits, exact in any float dtype.

    Args:
        offsets: [K, 3] int64, each in [0, 2^24).
        dtype: of the rows they are appended to.

    Returns:
        [K, 9] of ``dtype``; per axis the digits from low to high.
    """
    digits = [(offsets >> (8 * place)) & 0xFF for place in range(DIGITS)]
    return torch.stack(digits, dim=-1).reshape(-1, POSITION_CHANNELS).to(dtype)


def unpack_offsets(channels: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_offsets`.

    Args:
        channels: [K, 9] float.

    Returns:
        [K, 3] int64.
    """
    digits = channels.to(torch.int64).reshape(-1, AXES, DIGITS)
    place_values = torch.tensor([256**place for place in range(DIGITS)], device=channels.device)
    return (digits * place_values).sum(-1)


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Where one image or video stands in a prompt.

    Attributes:
        start: index of its first slot.
        length: number of its slots (K for a compressed video).
        grid: its token grid before compression.
        t_factor: see :func:`temporal_offsets`; ignored for images.
        offsets_travel: True where the rows carry their own offsets, so that every slot is set to the base.
    """

    start: int
    length: int
    grid: VideoGrid
    t_factor: float
    offsets_travel: bool


def prompt_positions(num_tokens: int, spans: Sequence[VisualSpan]) -> tuple[np.ndarray, int]:
    """Positions of a whole prompt, exact for text and images; each slot of a compressed video holds its base.

    Adding the offset that a kept row carries to the base in its slot gives the row's original position,
    so the result does not depend on which rows are kept, nor on how the prompt is cut into chunks.

    Args:
        num_tokens: length of the prompt, placeholders expanded.
        spans: images and videos in prompt order.

    Returns:
        ``(positions, delta)``: [3, num_tokens] int64, and the number to add to a later token's index to
        get its position.

    Raises:
        ValueError: spans overlap or leave the prompt.
    """
    positions = np.empty((AXES, num_tokens), dtype=np.int64)
    cursor = 0
    next_position = 0
    for span in spans:
        if span.start < cursor or span.start + span.length > num_tokens:
            raise ValueError(f"visual span {span} overlaps another or leaves the prompt of {num_tokens} tokens")
        text = span.start - cursor
        positions[:, cursor : span.start] = next_position + np.arange(text)
        base = next_position + text
        stop = span.start + span.length
        if span.offsets_travel:
            positions[:, span.start : stop] = base
        else:
            positions[:, span.start : stop] = base + video_offsets(span.grid, span.t_factor).numpy().T
        next_position = base + position_extent(span.grid, span.t_factor)
        cursor = stop
    positions[:, cursor:] = next_position + np.arange(num_tokens - cursor)
    end = next_position + (num_tokens - cursor)
    return positions, int(end - num_tokens)
