"""The sampling rule: pictures on screen at grid times, cells that windows share, exact counts for long videos."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from score_vllm.video import VideoWindowError
from score_vllm.video.sampling import Sample, choose


def constant(seconds: float, rate: float = 25.0) -> tuple[np.ndarray, float]:
    count = round(seconds * rate)
    return np.arange(count) / rate, count / rate


def cells(sample: Sample) -> list[tuple[float, float]]:
    times = sample.times.round(6).tolist()
    return list(zip(times[::2], times[1::2], strict=True))


@pytest.mark.parametrize(
    ("seconds", "rate", "options", "expected"),
    [
        (10, 25, {}, 20),
        (10, 30000 / 1001, {}, 20),
        (3600, 25, {}, 128),
        (64, 25, {}, 128),
        (64.1, 25, {}, 128),
        (59.5, 2, {}, 120),  # the last cell is completed with the last picture
        (1, 25, {}, 4),  # at least four
        (1.6, 25, {}, 4),
        (0.12, 25, {}, 4),  # three pictures: all of them, the last cell completed
        (0.08, 25, {}, 2),
        (0.04, 25, {}, 1),
        (10, 25, {"max_frames": 6}, 6),
        (10, 25, {"max_frames": 7}, 6),
        (10, 25, {"max_frames": 1}, 1),
        (1, 25, {"max_frames": 2}, 2),
        (10, 25, {"fps": None}, 128),
        (4, 25, {"fps": 0}, 100),
        (1, 25, {"fps": None, "max_frames": 64, "temporal_merge": 1}, 25),
        (100, 25, {"fps": None, "max_frames": 64, "temporal_merge": 1}, 64),
        (100, 25, {"max_frames": 0}, 200),
        (100, 25, {"thinning": "octave"}, 100),
        (300, 25, {"thinning": "octave"}, 76),  # 300 s at one frame in four seconds, the last cell completed
        (10, 25, {"start": 2.0, "end": 8.0}, 12),
        (10, 25, {"start": 9.0}, 4),
        (10, 25, {"start": 3.25, "end": 7.25}, 10),  # a cell at either end is cut and kept inside the window
    ],
)
def test_how_many(seconds: float, rate: float, options: dict[str, Any], expected: int) -> None:
    assert len(choose(*constant(seconds, rate), **options).times) == expected


def test_times_are_the_grids() -> None:
    sample = choose(*constant(10))
    np.testing.assert_allclose(sample.times, np.arange(20) / 2)
    assert sample.step == 0.5
    np.testing.assert_array_equal(sample.indices, np.floor(sample.times * 25 + 1e-6))


def test_a_picture_that_stays_is_read_again() -> None:
    stamps = [0.0, 0.5, 1.0, 20.0, 20.5]
    sample = choose(stamps, 21.0)
    assert len(sample.times) == 42
    assert sample.indices.tolist() == [0, 1, *[2] * 38, 3, 4]


def test_exactly_max_frames_evenly_and_on_the_grid() -> None:
    sample = choose(*constant(3600))
    assert len(sample.times) == 128
    np.testing.assert_allclose(sample.times * 2, np.rint(sample.times * 2))
    assert (sample.times[0], sample.times[-1]) == (0.0, 3599.5)
    steps = np.diff(sample.times)
    assert steps.max() - steps.min() <= 0.5
    assert sample.step == pytest.approx(steps.mean())


@pytest.mark.parametrize(("length", "goal"), [(10, 0.80), (20, 0.89), (30, 0.93)])
def test_sliding_windows_share_their_cells(length: int, goal: float) -> None:
    """Windows of 10 to 30 s that slide by 2 s: what was encoded for one serves the next."""
    stamps, duration = constant(120, 30)
    windows = [set(cells(choose(stamps, duration, start=s, end=s + length))) for s in range(0, 120 - length, 2)]
    shared = [len(a & b) / len(b) for a, b in itertools.pairwise(windows)]
    assert min(shared) >= goal


def test_windows_that_start_between_grid_times_share_their_inner_cells() -> None:
    stamps, duration = constant(60)
    first = choose(stamps, duration, start=3.3, end=23.3)
    second = choose(stamps, duration, start=5.7, end=25.7)
    shared = set(cells(first)) & set(cells(second))
    assert len(shared) >= 16
    for sample in (first, second):
        assert (sample.times >= sample.window[0]).all()
        assert (sample.times < sample.window[1]).all()


@pytest.mark.parametrize("thinning", ["even", "octave"])
def test_a_growing_video_keeps_its_cells(thinning: str) -> None:
    kept = []
    for seconds in range(4, 62, 2):
        now = set(cells(choose(*constant(seconds), thinning=thinning)))
        kept.append(now)
    assert all(a <= b for a, b in itertools.pairwise(kept))
    if thinning == "octave":  # and past max_frames, within an octave
        long = [set(cells(choose(*constant(s), thinning="octave"))) for s in range(70, 120, 8)]
        assert all(len(a & b) >= len(a) - 1 for a, b in itertools.pairwise(long))


timelines = st.lists(st.floats(0.001, 5.0), min_size=0, max_size=80).map(lambda steps: np.cumsum([0.0, *steps]))


@settings(max_examples=200)
@example(np.array([0.0, 1.0, 2.0]), 1.0, 1.0, 2, "even", 1, 1.192092896e-07, 1.0)
@example(np.array([0.0, 1.0]), 1.0, 0.3, 2, "octave", 4, 0.0, 0.0)
@given(
    timelines,
    st.floats(0.001, 3.0),
    st.sampled_from([None, 0.3, 1.0, 2.0, 3.7, 10.0]),
    st.integers(1, 60),
    st.sampled_from(["even", "octave"]),
    st.sampled_from([1, 2, 4]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_any_timeline(
    stamps: np.ndarray,
    last: float,
    fps: float | None,
    max_frames: int,
    thinning: str,
    merge: int,
    begin: float,
    size: float,
) -> None:
    duration = float(stamps[-1]) + last
    start = begin * duration * 0.9
    end = start + max(0.001, size * (duration - start))
    sample = choose(
        stamps,
        duration,
        fps=fps,
        max_frames=max_frames,
        thinning=thinning,
        temporal_merge=merge,
        start=start,
        end=end,
    )
    count = len(sample.times)
    assert 1 <= count <= max_frames + merge * (fps is None)
    assert len(sample.indices) == count
    assert (np.diff(sample.times) >= -1e-9).all()
    assert (np.diff(sample.indices) >= 0).all()
    assert (sample.times >= sample.window[0] - 1e-9).all()
    assert (sample.times <= sample.window[1] + 1e-9).all()
    # What a player shows then, up to the rounding of stamps.
    shown = np.searchsorted(stamps, sample.times + 1e-3, side="right") - 1
    before = np.searchsorted(stamps, sample.times - 1e-3, side="right") - 1
    assert ((sample.indices <= shown) & (sample.indices >= before)).all()
    assert sample.step > 0
    pictures = np.searchsorted(stamps, sample.window[1] - 1e-3) - np.searchsorted(stamps, start, side="right") + 1
    if fps and thinning == "even" and len(stamps) > 1:
        grid = int((sample.window[1] - sample.window[0]) * fps) - 1
        assert count >= min(max_frames - max_frames % merge if max_frames >= merge else 1, grid, max_frames)
        assert count >= min(4, max(1, pictures - 1), max_frames) - merge + 1


@settings(max_examples=100)
@given(timelines, st.floats(0.01, 3.0), st.floats(0.05, 0.95))
def test_two_windows_read_what_one_reads(stamps: np.ndarray, last: float, part: float) -> None:
    """Nothing is lost between a window and the next."""
    duration = float(stamps[-1]) + last
    if duration < 6:
        return
    cut = part * duration
    whole = choose(stamps, duration, max_frames=0, min_frames=1)
    parts = [choose(stamps, duration, max_frames=0, min_frames=1, start=a, end=b) for a, b in ((0, cut), (cut, None))]
    grid = set(np.rint(whole.times * 2).astype(int)) if len(stamps) > 1 else set()
    seen = {round(t * 2, 6) for p in parts for t in p.times}
    near = {k for k in grid if abs(k / 2 - cut) > 0.3 and k / 2 < duration - 0.6}
    assert near <= seen


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"start": 10.0}, "start", r"start must be in \[0, 10\.000\) for this video, got 10\.0"),
        ({"start": -1.0}, "start", "start must be a number of seconds >= 0"),
        ({"start": float("nan")}, "start", "start must be a number"),
        ({"start": 3.0, "end": 3.0}, "end", "end must be above start = 3, got 3.0"),
        ({"end": float("inf")}, "end", "end must be a number"),
        ({"end": True}, "end", "end must be a number"),
    ],
)
def test_windows_that_do_not_fit(options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(VideoWindowError, match=message) as caught:
        choose(*constant(10), **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": -1.0}, "fps must be"),
        ({"fps": float("inf")}, "fps must be"),
        ({"max_frames": -1}, "max_frames must be"),
        ({"thinning": "first"}, "thinning must be one of"),
        ({"temporal_merge": 0}, "temporal_merge and min_frames"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*constant(10), **options)
    with pytest.raises(ValueError, match="stamps must be"):
        choose([], 1.0)
    with pytest.raises(ValueError, match="stamps must be"):
        choose([0.0, 2.0, 1.0], 3.0)
