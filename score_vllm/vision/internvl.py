"""InternVL3.5 in transformers' format: square frames of one size, each after its number in words."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch

from score_vllm.layout import VideoLayout, sequential_layout
from score_vllm.types import VideoGrid


def merge_size(config: Any) -> int:
    """Patches along one side of a token."""
    return round(1 / config.downsample_ratio)


def frame_side(config: Any) -> int:
    """Tokens along one side of a frame: 16 of 448 pixels."""
    vision = config.vision_config
    return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)


def internvl_layout(num_frames: int, encode: Callable[[str], list[int]], config: Any, processor: Any) -> VideoLayout:
    """The span of a video: ``Frame1: <img>`` rows ``</img>``, a line per frame, tokenised as one text.

    Args:
        num_frames: F.
        encode: token ids of a text, special tokens of the text included and no others.
        config: the model's.
        processor: transformers', for its tokens.
    """
    between = f"{processor.start_image_token}{processor.image_token}{processor.end_image_token}"
    ids = encode("\n".join(f"Frame{number + 1}: {between}" for number in range(num_frames)))
    row = processor.image_token_id
    texts = [list(group) for is_row, group in groupby(ids, lambda token: token == row) if not is_row]
    side = frame_side(config)
    grid = VideoGrid(num_frames, side, side)
    nothing: list[list[int]] = [[]] * (num_frames - 1)
    return sequential_layout(grid, texts[:-1], nothing + texts[-1:])


def units(patches: torch.Tensor, config: Any) -> torch.Tensor:
    """[F * N * U, H, d] with the U patches of a token as neighbours, from [F, 1 + P, H, d] rows of the tower."""
    count, size, side = len(patches), merge_size(config), frame_side(config)
    grid = patches[:, 1:].unflatten(1, (side, size, side, size))
    return grid.transpose(2, 3).reshape(count * side * side * size * size, *patches.shape[2:])
