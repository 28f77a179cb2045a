from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from score_vllm.positions import (
    MAX_OFFSET,
    POSITION_CHANNELS,
    VisualSpan,
    pack_offsets,
    position_extent,
    prompt_positions,
    unpack_offsets,
    video_offsets,
)
from score_vllm.types import VideoGrid

OFFSETS = st.lists(st.tuples(*[st.integers(0, MAX_OFFSET)] * 3), min_size=1, max_size=50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(offsets=OFFSETS)
def test_offsets_survive_every_row_dtype(offsets: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    table = torch.tensor(offsets)
    channels = pack_offsets(table, dtype)
    assert channels.shape == (len(offsets), POSITION_CHANNELS)
    assert channels.dtype == dtype
    assert torch.equal(unpack_offsets(channels), table)


def test_whole_numbers_do_not_survive_bf16_undivided() -> None:
    """Why the digits exist."""
    assert torch.tensor([257, 1001, 4097]).bfloat16().long().tolist() == [256, 1000, 4096]


def test_video_offsets_by_hand() -> None:
    offsets = video_offsets(VideoGrid(2, 2, 3), 2.5)
    assert offsets.tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2],
        [2, 0, 0], [2, 0, 1], [2, 0, 2], [2, 1, 0], [2, 1, 1], [2, 1, 2],
    ]  # fmt: skip
    assert position_extent(VideoGrid(2, 2, 3), 2.5) == 3
    assert position_extent(VideoGrid(4, 2, 3), 2.5) == 8


grids = st.builds(VideoGrid, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


@given(st.lists(st.tuples(st.integers(0, 5), grids, st.floats(0, 60)), max_size=4), st.integers(0, 6), st.randoms())
def test_compressed_prompt_agrees_with_the_whole_one(parts: list, tail: int, random) -> None:
    """Text, decode delta and base + offset of any kept token equal the unpruned prompt's, whatever is kept."""
    whole, pruned, kept_slots, kept_offsets = [], [], [], []
    at_whole = at_pruned = 0
    keep_map: list[int] = []
    for text, grid, factor in parts:
        keep_map += range(at_whole, at_whole + text)
        at_whole, at_pruned = at_whole + text, at_pruned + text
        kept = sorted(random.sample(range(grid.num_tokens), random.randint(1, grid.num_tokens)))
        whole.append(VisualSpan(at_whole, grid.num_tokens, grid, factor, offsets_travel=False))
        pruned.append(VisualSpan(at_pruned, len(kept), grid, factor, offsets_travel=True))
        kept_slots += range(at_pruned, at_pruned + len(kept))
        kept_offsets.append(video_offsets(grid, factor)[kept])
        keep_map += [at_whole + k for k in kept]
        at_whole, at_pruned = at_whole + grid.num_tokens, at_pruned + len(kept)
    keep_map += range(at_whole, at_whole + tail)
    full, full_delta = prompt_positions(at_whole + tail, whole)
    short, short_delta = prompt_positions(at_pruned + tail, pruned)
    if kept_slots:
        short[:, kept_slots] += torch.cat(kept_offsets).numpy().T
    assert np.array_equal(short, full[:, keep_map])
    assert short_delta + at_pruned + tail == full_delta + at_whole + tail


def test_overlapping_spans_are_refused() -> None:
    span = VisualSpan(0, 4, VideoGrid(1, 2, 2), 1.0, offsets_travel=True)
    with pytest.raises(ValueError, match="overlaps"):
        prompt_positions(10, [span, span])
    with pytest.raises(ValueError, match="leaves the prompt"):
        prompt_positions(3, [span])


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0])
def test_bad_time_factor(factor: float) -> None:
    with pytest.raises(ValueError, match="t_factor"):
        video_offsets(VideoGrid(2, 2, 2), factor)


def test_offset_beyond_the_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        video_offsets(VideoGrid(2, 1, 1), MAX_OFFSET + 1.0)
