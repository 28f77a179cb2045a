"""The one rule for which pictures of a video are read: serving, training, evaluation and score-viz all call it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from score_vllm.config import DEFAULT_MAX_FRAMES
from score_vllm.video.container import VideoWindowError

# Qwen's models merge two consecutive frames into one temporal cell.
TEMPORAL_MERGE = 2
MIN_FRAMES = 4
DEFAULT_FPS = 2.0
# What options and requests may ask for; the library takes any rate up to 1000.
MAX_FPS = 240
# Most merged tokens of a temporal cell, by which frames are made smaller before the vision tower.
DEFAULT_CELL_TOKENS = 768
THINNINGS = ("even", "octave")
# Stamps are rounded to their container's ticks (1 ms in WebM): a picture this little late counts as on screen.
_TICK = 6e-4


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is read of a video.

    Attributes:
        indices: [F] int64, which picture; not descending (a picture that stays on screen is read again).
        times: [F] float64, seconds from the first picture of the source; at that moment the picture is on screen.
        step: seconds from one frame to the next on the grid (the mean where frames were left out).
        window: ``(start, end)`` in seconds, inside the source.
    """

    indices: np.ndarray
    times: np.ndarray
    step: float
    window: tuple[float, float]


def choose(
    stamps: Sequence[float] | np.ndarray,
    duration: float,
    *,
    fps: float | None = DEFAULT_FPS,
    max_frames: int = DEFAULT_MAX_FRAMES,
    start: float | None = None,
    end: float | None = None,
    thinning: str = "even",
    temporal_merge: int = TEMPORAL_MERGE,
    min_frames: int = MIN_FRAMES,
) -> Sample:
    """Choose the pictures of ``[start, end)``: those on screen at k / fps seconds from the start of the source.

    Frames come in cells of ``temporal_merge`` grid times that begin at a multiple of ``temporal_merge``, so windows
    that overlap share their cells. A cell is read if one of its grid times lies in the window; its times outside are
    moved to the window's edge (at the end: to the last picture). Where the window holds more than ``max_frames``:

    - ``even``: exactly ``max_frames`` grid times, evenly from the first to the last;
    - ``octave``: the same rule at fps / 2, fps / 4, ..., the first that fits, so that a growing video keeps its cells.

    A window of fewer than ``min_frames`` grid times is read at ``min_frames`` times evenly over it, or as many as it
    has pictures. A source of one picture is one frame.

    Args:
        stamps: seconds of all pictures, ascending, the first 0.
        duration: seconds of the source, above the last stamp.
        fps: grid times per second; None or 0: no grid, but ``max_frames`` times evenly from first to last picture, or
            every picture where there are no more.
        max_frames: most frames; 0: no limit.
        start: seconds; None: 0.
        end: seconds; None or beyond the source: its end.
        thinning: ``even`` or ``octave``.
        temporal_merge: frames per cell, >= 1.
        min_frames: see above.

    Returns:
        The choice; F is a multiple of ``temporal_merge`` unless it is 1 or ``max_frames`` or ``fps`` forbid it.

    Raises:
        VideoWindowError: the window is empty or outside the source.
        ValueError: another argument is out of range.
    """
    stamps = np.asarray(stamps, dtype=np.float64)
    if stamps.ndim != 1 or not len(stamps) or (np.diff(stamps) < 0).any():
        raise ValueError(f"stamps must be a non-empty ascending list of seconds, got {len(stamps)} of them")
    check_sampling(fps, max_frames, thinning, temporal_merge, min_frames)
    low, high = resolve_window(start, end, duration)
    first = max(0, int(np.searchsorted(stamps, low + _TICK, side="right")) - 1)
    stop = int(np.searchsorted(stamps, high - _TICK, side="right"))
    shown = stamps[first : max(stop, first + 1)]
    last = max(low, float(shown[-1]))  # from here on the window shows its last picture
    if len(stamps) == 1 or max_frames == 1:
        times, step = np.array([low]), 1 / fps if fps else high - low
    elif not fps:
        times, step = _evenly(shown, low, last, high, max_frames, temporal_merge)
    else:
        times, step = _grid(shown, low, last, high, fps, max_frames, thinning, temporal_merge, min_frames)
    indices = np.clip(np.searchsorted(stamps, times + _TICK, side="right") - 1, 0, len(stamps) - 1)
    return Sample(indices, times, float(step), (low, high))


def resolve_window(start: float | None, end: float | None, duration: float) -> tuple[float, float]:
    """``(start, end)`` inside a source of ``duration`` seconds.

    Raises:
        VideoWindowError: start or end is not a finite number >= 0, start is not below the duration, or end is not
            above start.
    """
    for field, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not math.isfinite(value) or value < 0):
            raise VideoWindowError(field, f"{field} must be a number of seconds >= 0, got {value!r}")
    low, high = start or 0.0, duration if end is None else end
    if low >= duration:
        raise VideoWindowError("start", f"start must be in [0, {duration:.3f}) for this video, got {start!r}")
    if high <= low:
        raise VideoWindowError("end", f"end must be above start = {low:g}, got {end!r}")
    return float(low), float(min(high, duration))


def check_sampling(
    fps: float | None = DEFAULT_FPS,
    max_frames: int = DEFAULT_MAX_FRAMES,
    thinning: str = "even",
    temporal_merge: int = TEMPORAL_MERGE,
    min_frames: int = MIN_FRAMES,
) -> None:
    """What can be wrong with the arguments of :func:`choose` whatever the video is.

    Raises:
        ValueError: one of them is out of range.
    """
    if fps is not None and not (math.isfinite(fps) and 0 <= fps <= 1000):
        raise ValueError(f"fps must be None or in [0, 1000], got {fps!r}")
    if max_frames < 0:
        raise ValueError(f"max_frames must be >= 0, got {max_frames!r}")
    if thinning not in THINNINGS:
        raise ValueError(f"thinning must be one of {list(THINNINGS)}, got {thinning!r}")
    if temporal_merge < 1 or min_frames < 1:
        raise ValueError(f"temporal_merge and min_frames must be >= 1, got {temporal_merge!r} and {min_frames!r}")


def _whole(count: int, merge: int) -> int:
    """``count`` without an unfinished cell, unless that would leave nothing."""
    return count - count % merge if count >= merge else count


def _evenly(
    shown: np.ndarray, low: float, last: float, high: float, max_frames: int, merge: int
) -> tuple[np.ndarray, float]:
    count = len(shown)
    if max_frames and max_frames < count:
        count = _whole(max_frames, merge)
        times = np.linspace(low, last, count)
        return times, (last - low) / (count - 1)
    # The unfinished cell of an odd number of pictures is completed with the last one.
    times = np.concatenate([np.maximum(shown, low), np.full(-count % merge if count > 1 else 0, last)])
    return times, (high - low) / count


def _grid(
    shown: np.ndarray,
    low: float,
    last: float,
    high: float,
    fps: float,
    max_frames: int,
    thinning: str,
    merge: int,
    min_frames: int,
) -> tuple[np.ndarray, float]:
    # A grid time in the very last half picture would show that picture alone.
    middle = float(np.median(np.diff(shown))) if len(shown) > 1 else high - low
    margin = min(middle / 2, 0.25 / fps, (high - low) / 2)
    begin = math.ceil((low - _TICK) * fps)
    stop = max(begin, math.floor((high - margin) * fps) + 1)  # grid times begin .. stop - 1
    count = stop - begin
    least = min(min_frames, len(shown), max_frames or min_frames)
    if count < least:
        count = least + (-least % merge if least > 1 else 0)
        count = min(count, _whole(max_frames, merge)) if max_frames else count
        step = (high - low) / count
        return low + step * np.arange(count), step
    if not count:
        return np.array([low]), 1 / fps
    cells = np.arange(begin // merge * merge, -(-stop // merge) * merge)
    if not max_frames or len(cells) <= max_frames:
        return np.clip(cells / fps, low, max(last, (stop - 1) / fps)), 1 / fps
    if thinning == "octave" and max_frames >= merge:
        return _grid(shown, low, last, high, fps / 2, max_frames, thinning, merge, 1)
    number = _whole(max_frames, merge)
    if number == 1:
        return np.array([low]), 1 / fps
    span, steps = stop - 1 - begin, number - 1
    if span < steps:  # the grid times fit, their cells do not
        number, steps = _whole(span + 1, merge), _whole(span + 1, merge) - 1
    if steps < 1:
        return np.array([max(low, begin / fps)]), 1 / fps
    # Integer rounding, half up: no float can make two equal.
    picks = begin + (2 * np.arange(number) * span + steps) // (2 * steps)
    return np.maximum(picks / fps, low), span / steps / fps
