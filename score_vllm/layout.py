"""The place of every token of one video: its span in the prompt, all of it known before the vision tower runs.

A video is one span of the prompt. Its structure rows (timestamps, markers, newlines) always stay; of its vision rows a
method keeps K. Slots count the rows of the span before anything is dropped; offsets (t, h, w) count positions from the
span's first. Text after the span stands ``extent`` positions after the span's base, whatever is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from score_vllm.types import VideoGrid

AXES = 3
# Base-256 digits that carry one number through a row: whole numbers below 256 are exact in bf16 and fp16.
DIGITS = 3
MAX_OFFSET = 256**DIGITS - 1
# In place of a token id: a structure row that is a parameter of the model (LLaVA's newline), not text.
LEARNED = -1
_HEADER = 12


@dataclass(frozen=True, slots=True, eq=False)
class VideoLayout:
    """The span of one video.

    Attributes:
        grid: T, rows, columns of its vision tokens.
        ids: [S] int64 token id of each structure row, or :data:`LEARNED`.
        slots: [S] int64 ascending, their places in the unpruned span of S + T * N rows.
        offsets: [S, 3] int64, their (t, h, w).
        cells: [T, 4] int64 (slot, t, h, w) of each cell's first vision token.
        steps: [2, 4] int64, what one row down and one column to the right add to those four.
        extent: positions by which the span advances what follows it.
    """

    grid: VideoGrid
    ids: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray
    cells: np.ndarray
    steps: np.ndarray
    extent: int

    def __post_init__(self) -> None:
        count = len(self.ids)
        shapes = {"slots": (count,), "offsets": (count, AXES), "cells": (self.grid.t, 4), "steps": (2, 4)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"VideoLayout.{name} must be {list(shape)}, got {list(getattr(self, name).shape)}")
        if not 1 <= self.extent <= MAX_OFFSET + 1:
            raise ValueError(f"a video may span 1 to {MAX_OFFSET + 1} positions, this one spans {self.extent}")

    @property
    def structure_tokens(self) -> int:
        """S."""
        return len(self.ids)

    @property
    def has_text(self) -> bool:
        """True where structure rows are text, whose ids travel with the rows."""
        return bool((self.ids != LEARNED).any())

    def vision(self) -> np.ndarray:
        """[T * N, 4] int64 (slot, t, h, w) of every vision token, in the order of the flat index ``t * N + n``."""
        rows = np.arange(self.grid.h)[:, None, None] * self.steps[0]
        columns = np.arange(self.grid.w)[:, None] * self.steps[1]
        return (self.cells[:, None, None] + rows + columns).reshape(-1, 4)

    def vision_offsets(self) -> torch.Tensor:
        """[T * N, 3] int64 (t, h, w) of every vision token."""
        return torch.from_numpy(np.ascontiguousarray(self.vision()[:, 1:]))

    def unpruned_offsets(self) -> np.ndarray:
        """[S + T * N, 3] int64 (t, h, w) of every row of the unpruned span."""
        vision = self.vision()
        out = np.empty((len(self.ids) + len(vision), AXES), dtype=np.int64)
        out[self.slots] = self.offsets
        out[vision[:, 0]] = vision[:, 1:]
        return out

    def to_tensor(self) -> torch.Tensor:
        """[12 + 4 T + 5 S] int64, beginning with T, rows, columns; the form in which a layout passes to the worker."""
        header = [self.grid.t, self.grid.h, self.grid.w, self.extent, *self.steps.ravel()]
        parts = [header, self.cells.ravel(), self.ids, self.slots, self.offsets.ravel()]
        return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))

    @classmethod
    def from_tensor(cls, packed: torch.Tensor) -> VideoLayout:
        """Inverse of :meth:`to_tensor`."""
        flat = packed.cpu().numpy()
        grid = VideoGrid(*(int(value) for value in flat[:AXES]))
        cells, rest = np.split(flat[_HEADER:], [4 * grid.t])
        ids, slots, offsets = np.split(rest, [len(rest) // 5, 2 * (len(rest) // 5)])
        steps = flat[4:_HEADER].reshape(2, 4)
        return cls(grid, ids, slots, offsets.reshape(-1, AXES), cells.reshape(-1, 4), steps, int(flat[3]))


def grid_layout(grid: VideoGrid, t_factor: float) -> VideoLayout:
    """Vision tokens alone, one position grid over the whole video (Qwen2-VL, Qwen2.5-VL).

    Args:
        grid: T, rows, columns.
        t_factor: positions per cell: seconds per cell times tokens per second (Qwen2.5-VL report, M-RoPE aligned to
            absolute time); cell c stands at ``floor(c * t_factor)``, computed in float64 as vLLM does.

    Raises:
        ValueError: ``t_factor`` is negative or not finite, or an offset is beyond what the digits carry.
    """
    if not np.isfinite(t_factor) or t_factor < 0:
        raise ValueError(f"t_factor must be a finite number >= 0, got {t_factor!r}")
    index = np.arange(grid.t)
    times = np.floor(index * t_factor)
    if times[-1] > MAX_OFFSET:
        raise ValueError(f"temporal offset {times[-1]:.0f} is above {MAX_OFFSET}: the video is too long")
    times = times.astype(np.int64)
    nothing = np.zeros_like(index)
    cells = np.stack([index * grid.tokens_per_frame, times, nothing, nothing], axis=1)
    steps = np.array([[grid.w, 0, 1, 0], [1, 0, 0, 1]])
    extent = max(int(times[-1]), grid.h - 1, grid.w - 1) + 1
    return VideoLayout(grid, *_structure([]), cells, steps, extent)


def interleaved_layout(
    grid: VideoGrid, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]
) -> VideoLayout:
    """Text before and after each cell, and a position grid of one cell inside (Qwen3-VL, Qwen3.5, GLM-4.xV).

    Args:
        grid: T, rows, columns.
        prefixes: T lists of token ids that stand before each cell.
        suffixes: T lists of token ids that stand after each cell.

    Raises:
        ValueError: not T lists each.
    """
    _check_cells(grid, prefixes, suffixes)
    structure, cells = [], []
    slot = position = 0
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        for token in prefix:
            structure.append((token, slot, position))
            slot, position = slot + 1, position + 1
        cells.append((slot, position, position, position))
        slot, position = slot + grid.tokens_per_frame, position + max(grid.h, grid.w)
        for token in suffix:
            structure.append((token, slot, position))
            slot, position = slot + 1, position + 1
    steps = np.array([[grid.w, 0, 1, 0], [1, 0, 0, 1]])
    return VideoLayout(grid, *_structure(structure), np.array(cells), steps, position)


def timestamped_layout(
    grid: VideoGrid, timestamps: Sequence[float], encode: Callable[[str], list[int]], start: int, end: int
) -> VideoLayout:
    """Each cell after its time in words and a marker, and before another (Qwen3-VL, Qwen3.5).

    Args:
        grid: T, rows, columns.
        timestamps: T seconds.
        encode: token ids of a text, without special tokens.
        start, end: token ids of the markers.

    Raises:
        ValueError: not T timestamps.
    """
    prefixes = [[*encode(f"<{float(seconds):.1f} seconds>"), start] for seconds in timestamps]
    return interleaved_layout(grid, prefixes, [[end]] * grid.t)


def sequential_layout(
    grid: VideoGrid, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]], row_newlines: bool = False
) -> VideoLayout:
    """One position per row of the span, on all axes alike: 1-D positions (LLaVA, InternVL).

    Args:
        grid: T, rows, columns.
        prefixes: T lists of token ids (or :data:`LEARNED`) that stand before each cell.
        suffixes: T lists of the same that stand after each cell.
        row_newlines: a :data:`LEARNED` row after each row of each cell.

    Raises:
        ValueError: not T lists each.
    """
    _check_cells(grid, prefixes, suffixes)
    structure, cells = [], []
    slot, width = 0, grid.w + row_newlines
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        structure += [(token, slot + i, slot + i) for i, token in enumerate(prefix)]
        slot += len(prefix)
        cells.append((slot,) * 4)
        if row_newlines:
            structure += [(LEARNED, place, place) for place in range(slot + grid.w, slot + grid.h * width, width)]
        slot += grid.h * width
        structure += [(token, slot + i, slot + i) for i, token in enumerate(suffix)]
        slot += len(suffix)
    steps = np.array([[width] * 4, [1] * 4])
    return VideoLayout(grid, *_structure(structure), np.array(cells), steps, slot)


def _check_cells(grid: VideoGrid, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> None:
    if len(prefixes) != grid.t or len(suffixes) != grid.t:
        raise ValueError(f"prefixes and suffixes must be T={grid.t} lists, got {len(prefixes)} and {len(suffixes)}")


def _structure(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(ids, slots, offsets)`` of (token, slot, position) rows; text stands at one position on all axes."""
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], np.repeat(table[:, 2:], AXES, axis=1)
