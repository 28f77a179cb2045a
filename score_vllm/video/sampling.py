"""The one rule for which frames of a video are read: serving, training and evaluation all call it."""

from __future__ import annotations

import math

# Qwen2.5-VL merges two consecutive frames into one temporal cell.
TEMPORAL_MERGE = 2
MIN_FRAMES = 4
DEFAULT_FPS = 2.0
DEFAULT_MAX_FRAMES = 128


def sample_frame_indices(total_frames: int, source_fps: float, fps: float, max_frames: int) -> list[int]:
    """Indices of the frames to read: ``fps`` frames per second, at most ``max_frames``, evenly from first to last.

    n = duration * fps, clamped to [4, max_frames] and to the frames there are, rounded down to an even number
    (a lone odd frame would be merged with a copy of itself) unless only one is left; index i is
    ``round(i * (total - 1) / (n - 1))``. This is the rule of Qwen's reference preprocessing with the paper's
    limit of 128 frames (section 5.1).

    Args:
        total_frames: frames in the file, at least 1.
        source_fps: frames per second of the file; values that are not positive and finite count as 24.
        fps: frames per second to read; not positive means no limit by rate.
        max_frames: most frames to read; not positive means no limit by count.

    Returns:
        Strictly ascending indices in [0, total_frames).

    Raises:
        ValueError: ``total_frames`` < 1.
    """
    if total_frames < 1:
        raise ValueError(f"total_frames must be >= 1, got {total_frames}")
    if not (math.isfinite(source_fps) and source_fps > 0):
        source_fps = 24.0
    count = float(total_frames)
    if fps > 0:
        count = max(total_frames / source_fps * fps, MIN_FRAMES)
    if max_frames > 0:
        count = min(count, max_frames)
    wanted = int(min(count, total_frames))
    if wanted > 1:
        wanted -= wanted % TEMPORAL_MERGE
    if wanted <= 1:
        return [0]
    # Integer rounding, half up: no float can push an index out of range or make two equal.
    span, steps = total_frames - 1, wanted - 1
    return [(2 * i * span + steps) // (2 * steps) for i in range(wanted)]
