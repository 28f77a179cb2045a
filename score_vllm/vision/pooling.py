"""LLaVA-OneVision and LLaVA-Video: how a frame's token grid is halved, and the span that the frames make."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.layout import LEARNED, VideoLayout, sequential_layout
from score_vllm.types import VideoGrid

STRIDE = 2
POOL_MODES = ("bilinear", "average")
NEWLINES = ("one_token", "frame", "grid")


def pool_mode(config: Any) -> str:
    """``mm_spatial_pool_mode`` of a config; OneVision's where it names none.

    Raises:
        ValueError: another mode.
    """
    mode = getattr(config, "mm_spatial_pool_mode", "bilinear")
    if mode not in POOL_MODES:
        raise ValueError(f"mm_spatial_pool_mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    return mode


def frame_side(config: Any, patches: int) -> int:
    """Tokens on a side of a pooled frame of ``patches`` x ``patches``: 14 or 13 of 27."""
    return patches // STRIDE if pool_mode(config) == "average" else -(-patches // STRIDE)


def pool_frames(config: Any, frames: torch.Tensor) -> torch.Tensor:
    """Halve the grid of each frame.

    Args:
        config: the model's.
        frames: [F, P, D], P = side * side.

    Returns:
        [F, N, D].
    """
    count, patches, width = frames.shape
    side = round(patches**0.5)
    grid = frames.view(count, side, side, width).permute(0, 3, 1, 2)
    if pool_mode(config) == "average":
        pooled = F.avg_pool2d(grid, STRIDE)
    else:
        pooled = F.interpolate(grid, size=[frame_side(config, side)] * 2, mode="bilinear")
    return pooled.permute(0, 2, 3, 1).reshape(count, -1, width)


def frames_layout(config: Any, num_frames: int) -> VideoLayout:
    """The span of a video of square frames: 1-D positions, and the learned newline where the config has it.

    Raises:
        ValueError: ``mm_newline_position`` or ``mm_spatial_pool_mode`` names something else.
    """
    vision = config.vision_config
    side = frame_side(config, vision.image_size // vision.patch_size)
    newline = getattr(config, "mm_newline_position", "one_token")
    if newline not in NEWLINES:
        raise ValueError(f"mm_newline_position must be one of {', '.join(NEWLINES)}, got {newline!r}")
    suffixes: list[list[int]] = [[LEARNED] if newline == "frame" else [] for _ in range(num_frames)]
    if newline == "one_token":
        suffixes[-1] = [LEARNED]
    grid = VideoGrid(num_frames, side, side)
    return sequential_layout(grid, [[]] * num_frames, suffixes, row_newlines=newline == "grid")
