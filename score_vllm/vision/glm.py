"""GLM-4.1V, GLM-4.5V and GLM-4.6V: each cell of a video between two markers, and behind it its time in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from score_vllm.layout import VideoLayout, interleaved_layout
from score_vllm.types import VideoGrid

# Of transformers' processors, the one that writes whole seconds without a unit (GLM-4.1V, GLM-4.5V).
_WHOLE_SECONDS = "Glm4vProcessor"


def cell_seconds(seconds: Sequence[float], cells: int) -> list[float]:
    """Those of each cell's first frame, of ``seconds`` of all frames, two a cell; the last again for a cell beyond."""
    first = list(seconds[::2][:cells])
    return first + first[-1:] * (cells - len(first))


def glm_layout(
    grid: VideoGrid, seconds: Sequence[float], encode: Callable[[str], list[int]], config: Any, processor: Any
) -> VideoLayout:
    """The span of a video.

    Args:
        grid: T, rows, columns.
        seconds: T times, of each cell's first frame.
        encode: token ids of a text, without special tokens.
        config: the model's.
        processor: transformers', whose class decides how a time is written: ``1`` or ``1.5 seconds``.
    """
    whole = type(processor).__name__ == _WHOLE_SECONDS
    texts = [str(int(second)) if whole else f"{second:.1f} seconds" for second in seconds]
    suffixes = [[config.image_end_token_id, *encode(text)] for text in texts]
    return interleaved_layout(grid, [[config.image_start_token_id]] * grid.t, suffixes)
