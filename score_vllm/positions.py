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

from score_vllm.layout import AXES, DIGITS, VideoLayout

POSITION_CHANNELS = AXES * DIGITS


def pack_offsets(offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write whole numbers as base-256 digits, exact in any float dtype.

    Args:
        offsets: [K, A] int64, each in [0, 2^24); A is 3 for (t, h, w).
        dtype: of the rows they are appended to.

    Returns:
        [K, 3 A] of ``dtype``; per number the digits from low to high.
    """
    shifts = 8 * torch.arange(DIGITS, device=offsets.device)
    return ((offsets[..., None] >> shifts) & 0xFF).flatten(-2).to(dtype)


def unpack_offsets(channels: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_offsets`.

    Args:
        channels: [K, 3 A] float.

    Returns:
        [K, A] int64.
    """
    digits = channels.to(torch.int64).unflatten(-1, (channels.shape[-1] // DIGITS, DIGITS))
    # No tensor of place values: it would be copied from the host in every step.
    return sum((digits[..., place] * 256**place for place in range(1, DIGITS)), digits[..., 0])


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """The place of one image or video in a prompt.

    Attributes:
        start: index of its first slot.
        length: number of its slots (S + K for a compressed video).
        extent: positions by which it advances what follows it.
        offsets: [3, length] int64 from its base; None where rows carry their own, so that every slot holds the base.
    """

    start: int
    length: int
    extent: int
    offsets: np.ndarray | None = None

    @classmethod
    def unpruned(cls, start: int, layout: VideoLayout) -> VisualSpan:
        """The span of a video of which nothing is dropped, with the position of every row."""
        offsets = layout.unpruned_offsets().T
        return cls(start, offsets.shape[1], layout.extent, offsets)


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
        positions[:, span.start : stop] = base if span.offsets is None else base + span.offsets
        next_position = base + span.extent
        cursor = stop
    positions[:, cursor:] = next_position + np.arange(num_tokens - cursor)
    end = next_position + (num_tokens - cursor)
    return positions, int(end - num_tokens)
