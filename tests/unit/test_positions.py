from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from score_vllm.layout import MAX_OFFSET, VideoLayout, grid_layout, interleaved_layout, sequential_layout
from score_vllm.positions import POSITION_CHANNELS, VisualSpan, pack_offsets, prompt_positions, unpack_offsets
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


grids = st.builds(VideoGrid, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))


def text(grid: VideoGrid, random) -> list[list[int]]:
    return [[random.randrange(-1, 100) for _ in range(random.randrange(4))] for _ in range(grid.t)]


def any_layout(grid: VideoGrid, factor: float, random) -> VideoLayout:
    kind = random.randrange(3)
    if kind == 0:
        return grid_layout(grid, factor)
    if kind == 1:
        return interleaved_layout(grid, text(grid, random), text(grid, random))
    return sequential_layout(grid, text(grid, random), text(grid, random), row_newlines=random.random() < 0.5)


@given(st.lists(st.tuples(st.integers(0, 5), grids, st.floats(0, 60)), max_size=4), st.integers(0, 6), st.randoms())
def test_compressed_prompt_agrees_with_the_whole_one(parts: list, tail: int, random) -> None:
    """Text, decode delta and base + offset of any row equal the unpruned prompt's, in its order, whatever is kept."""
    whole, pruned, slots, offsets = [], [], [], []
    at_whole = at_pruned = 0
    keep_map: list[int] = []
    for text_tokens, grid, factor in parts:
        layout = any_layout(grid, factor, random)
        keep_map += range(at_whole, at_whole + text_tokens)
        at_whole, at_pruned = at_whole + text_tokens, at_pruned + text_tokens
        vision = layout.vision()
        kept = sorted(random.sample(range(grid.num_tokens), random.randint(1, grid.num_tokens)))
        stays = sorted([*layout.slots.tolist(), *vision[kept, 0].tolist()])
        whole.append(VisualSpan.unpruned(at_whole, layout))
        pruned.append(VisualSpan(at_pruned, len(stays), layout.extent))
        slots += range(at_pruned, at_pruned + len(stays))
        offsets.append(layout.unpruned_offsets()[stays])
        keep_map += [at_whole + k for k in stays]
        at_whole, at_pruned = at_whole + whole[-1].length, at_pruned + len(stays)
    keep_map += range(at_whole, at_whole + tail)
    full, full_delta = prompt_positions(at_whole + tail, whole)
    short, short_delta = prompt_positions(at_pruned + tail, pruned)
    if slots:
        short[:, slots] += np.concatenate(offsets).T
    assert np.array_equal(short, full[:, keep_map])
    assert short_delta + at_pruned + tail == full_delta + at_whole + tail


def test_overlapping_spans_are_refused() -> None:
    span = VisualSpan(0, 4, 4)
    with pytest.raises(ValueError, match="overlaps"):
        prompt_positions(10, [span, span])
    with pytest.raises(ValueError, match="leaves the prompt"):
        prompt_positions(3, [span])
