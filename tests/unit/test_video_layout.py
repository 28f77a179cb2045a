"""The span of a video: slots and offsets written out by hand, one row at a time, and by each builder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from score_vllm.layout import (
    LEARNED,
    MAX_OFFSET,
    VideoLayout,
    grid_layout,
    interleaved_layout,
    sequential_layout,
)
from score_vllm.types import VideoGrid

grids = st.builds(VideoGrid, st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))


def walk(layout: VideoLayout) -> list[tuple[int | str, tuple[int, int, int]]]:
    """(id or "v", offset) of every row of the unpruned span, in order."""
    kinds: dict[int, int | str] = dict(zip(layout.slots.tolist(), layout.ids.tolist(), strict=True))
    kinds |= {int(slot): "v" for slot in layout.vision()[:, 0]}
    offsets = layout.unpruned_offsets().tolist()
    assert sorted(kinds) == list(range(len(offsets))), "every slot is taken once"
    return [(kinds[i], tuple(offset)) for i, offset in enumerate(offsets)]


def test_grid_by_hand() -> None:
    layout = grid_layout(VideoGrid(2, 2, 3), 2.5)
    assert layout.vision_offsets().tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2],
        [2, 0, 0], [2, 0, 1], [2, 0, 2], [2, 1, 0], [2, 1, 1], [2, 1, 2],
    ]  # fmt: skip
    assert layout.vision()[:, 0].tolist() == list(range(12))
    assert layout.extent == 3
    assert grid_layout(VideoGrid(4, 2, 3), 2.5).extent == 8
    assert not layout.has_text


@given(grids, st.randoms())
def test_interleaved_one_row_at_a_time(grid: VideoGrid, random) -> None:
    prefixes = [[random.randrange(99) for _ in range(random.randrange(4))] for _ in range(grid.t)]
    suffixes = [[random.randrange(99) for _ in range(random.randrange(3))] for _ in range(grid.t)]
    want: list = []
    position = 0
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        for token in prefix:
            want.append((token, (position,) * 3))
            position += 1
        want += [("v", (position, position + r, position + c)) for r in range(grid.h) for c in range(grid.w)]
        position += max(grid.h, grid.w)
        for token in suffix:
            want.append((token, (position,) * 3))
            position += 1
    layout = interleaved_layout(grid, prefixes, suffixes)
    assert walk(layout) == want
    assert layout.extent == position


@given(grids, st.booleans(), st.randoms())
def test_sequential_one_row_at_a_time(grid: VideoGrid, row_newlines: bool, random) -> None:
    prefixes = [[random.randrange(-1, 99) for _ in range(random.randrange(3))] for _ in range(grid.t)]
    suffixes = [[random.randrange(-1, 99) for _ in range(random.randrange(3))] for _ in range(grid.t)]
    ids: list = []
    for prefix, suffix in zip(prefixes, suffixes, strict=True):
        ids += prefix
        for _ in range(grid.h):
            ids += ["v"] * grid.w + [LEARNED] * row_newlines
        ids += suffix
    layout = sequential_layout(grid, prefixes, suffixes, row_newlines)
    assert walk(layout) == [(kind, (i,) * 3) for i, kind in enumerate(ids)]
    assert layout.extent == len(ids)
    assert layout.has_text == any(kind not in ("v", LEARNED) for kind in ids)


@given(grids, st.randoms())
def test_layouts_survive_the_way_to_the_worker(grid: VideoGrid, random) -> None:
    lists = [[random.randrange(99)] * random.randrange(3) for _ in range(grid.t)]
    for layout in (
        grid_layout(grid, 1.5),
        interleaved_layout(grid, lists, lists),
        sequential_layout(grid, lists, lists),
    ):
        packed = layout.to_tensor()
        assert packed.dtype == torch.int64
        assert packed[:3].tolist() == [grid.t, grid.h, grid.w]
        back = VideoLayout.from_tensor(packed)
        assert (back.grid, back.extent) == (layout.grid, layout.extent)
        for name in ("ids", "slots", "offsets", "cells", "steps"):
            assert np.array_equal(getattr(back, name), getattr(layout, name)), name


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0])
def test_bad_time_factor(factor: float) -> None:
    with pytest.raises(ValueError, match="t_factor"):
        grid_layout(VideoGrid(2, 2, 2), factor)


@pytest.mark.parametrize("factor", [MAX_OFFSET + 1.0, 1e30])
def test_offset_beyond_the_channels_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="too long"):
        grid_layout(VideoGrid(2, 1, 1), factor)


def test_what_does_not_fit_is_refused() -> None:
    grid = VideoGrid(2, 1, 1)
    with pytest.raises(ValueError, match="T=2 lists, got 1 and 2"):
        interleaved_layout(grid, [[1]], [[1], [1]])
    plain = grid_layout(grid, 1.0)
    with pytest.raises(ValueError, match=r"VideoLayout.cells must be \[2, 4\]"):
        VideoLayout(grid, plain.ids, plain.slots, plain.offsets, plain.cells[:1], plain.steps, 1)
    with pytest.raises(ValueError, match="spans 0"):
        VideoLayout(grid, plain.ids, plain.slots, plain.offsets, plain.cells, plain.steps, 0)
