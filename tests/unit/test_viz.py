"""Pictures of selections, on clips made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from score_vllm import TokenSelection, VideoGrid, select_tokens
from score_vllm.viz import draw as viz
from score_vllm.viz.paint import BAR_SHOWN, GAP, LABEL_HEIGHT, LIGHT, MARGIN, STRIP_HEIGHT, dim_dropped, outline_kept

GRID = VideoGrid(t=5, h=4, w=6)
FRAMES, HEIGHT, WIDTH = 10, 64, 96


def clip(frames: int = FRAMES) -> np.ndarray:
    """A bright square on a coloured ground, one step to the right per frame."""
    out = np.empty((frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    out[:] = (60, 90, 200)
    for f in range(frames):
        out[f, 16:32, 8 * f : 8 * f + 16] = (250, 220, 60)
    return out


def keep(indices: list[int], grid: VideoGrid = GRID) -> TokenSelection:
    chosen = torch.tensor(indices)
    return TokenSelection(
        chosen, torch.zeros(len(indices), 2), torch.zeros(grid.num_tokens), grid.t, grid.tokens_per_frame
    )


def test_masks_put_every_token_in_its_place() -> None:
    mask = viz.kept_masks(GRID, keep([0, 5, 6, 24 + 23, 4 * 24 + 7]))
    assert mask.sum() == 5
    for t, row, column in [(0, 0, 0), (0, 0, 5), (0, 1, 0), (1, 3, 5), (4, 1, 1)]:
        assert mask[t, row, column]


def test_kept_patches_are_unchanged_and_dropped_ones_dark_and_greyer() -> None:
    frame = clip()[3]
    kept = np.zeros((4, 6), dtype=bool)
    kept[1, 2] = True
    shown = dim_dropped(frame, kept)
    assert np.array_equal(shown[16:32, 32:48], frame[16:32, 32:48])
    dropped = np.ones((HEIGHT, WIDTH), dtype=bool)
    dropped[16:32, 32:48] = False
    assert shown[dropped].max() < frame[dropped].max() / 2
    assert np.ptp(shown[dropped].astype(int), axis=1).max() < np.ptp(frame[dropped].astype(int), axis=1).max() / 4


def test_on_a_light_page_dropped_patches_fade_to_white() -> None:
    frame = clip()[3]
    kept = np.zeros((4, 6), dtype=bool)
    kept[1, 2] = True
    shown = dim_dropped(frame, kept, LIGHT)
    assert np.array_equal(shown[16:32, 32:48], frame[16:32, 32:48])
    dropped = np.ones((HEIGHT, WIDTH), dtype=bool)
    dropped[16:32, 32:48] = False
    assert shown[dropped].min() > 255 * 0.7
    sheet = viz.contact_sheet(clip(), GRID, {"a": keep([8])}, theme=LIGHT, cell_width=48)
    assert sheet[0, 0].tolist() == [255, 255, 255]


def test_borders_are_rounded_where_the_grid_does_not_divide_the_frame() -> None:
    frame = np.full((10, 7, 3), 200, dtype=np.uint8)
    kept = np.array([[True, False, True], [False, True, False], [True, False, True]])
    shown = dim_dropped(frame, kept)
    assert (shown[0, [0, 6]] == 200).all()
    assert (shown[0, 3] < 100).all()
    assert (shown[5, 3] == 200).all()


def test_the_outline_runs_along_the_border_of_kept_regions_only() -> None:
    frame = np.zeros((32, 32, 3), dtype=np.uint8)
    kept = np.array([[False, True], [False, True]])
    line = outline_kept(frame, kept).any(-1)
    assert line[:, 16].all()
    assert line.sum() == 32
    assert np.array_equal(outline_kept(frame, np.ones((8, 8), dtype=bool)), frame)
    assert np.array_equal(outline_kept(frame, np.eye(8, dtype=bool)), frame), "patches of 4 pixels get no outline"


def test_the_sheet_has_a_row_per_method_and_marks_the_cells_shown() -> None:
    one = viz.contact_sheet(clip(), GRID, {"a": keep([1, 30])}, cell_width=96)
    two = viz.contact_sheet(clip(), GRID, {"a": keep([1, 30]), "b": keep([2])}, cell_width=96)
    row = LABEL_HEIGHT + HEIGHT + GAP + STRIP_HEIGHT + 2 * GAP
    assert two.shape == (one.shape[0] + row, 5 * 96 + 4 * GAP + 2 * MARGIN, 3)
    # The top row is the video itself, at this width pixel for pixel.
    first = two[MARGIN + LABEL_HEIGHT :, MARGIN:][:HEIGHT, :96]
    assert np.array_equal(first, clip()[0])
    fewer = viz.contact_sheet(clip(), GRID, {"a": keep(list(range(24)))}, cell_width=96, max_cells=2)
    assert fewer.shape[1] == 2 * 96 + GAP + 2 * MARGIN
    strip = fewer[-MARGIN - 2 * GAP - STRIP_HEIGHT : -MARGIN - 2 * GAP, MARGIN:-MARGIN]
    # All is kept in cell 0, which is shown: its bar fills a fifth of the strip in the colour of shown cells.
    marked = (strip == BAR_SHOWN).all(-1)
    assert marked.any(0).sum() == pytest.approx(strip.shape[1] / 5, abs=2)
    assert marked.any(1).all()


def test_of_each_part_of_the_clip_the_cell_that_keeps_most_is_shown() -> None:
    selections = {"a": keep([4 * 24, 3, 5]), "b": keep([2 * 24])}
    sheet = viz.contact_sheet(clip(), GRID, selections, cell_width=96, max_cells=2)
    shown = [sheet[MARGIN + LABEL_HEIGHT :, MARGIN + left :][:HEIGHT, :96] for left in (0, 96 + GAP)]
    # Parts are cells 0 to 2 and 3 to 4; cell 0 keeps two tokens, cell 4 one.
    assert np.array_equal(shown[0], clip()[0])
    assert np.array_equal(shown[1], clip()[8])


def test_seconds_stand_under_the_cells() -> None:
    plain = viz.contact_sheet(clip(), GRID, {"a": keep([8])}, cell_width=96)
    times = np.arange(FRAMES) / 2 + 100
    timed = viz.contact_sheet(clip(), GRID, {"a": keep([8])}, cell_width=96, times=times)
    assert timed.shape == (plain.shape[0] + LABEL_HEIGHT, *plain.shape[1:])
    other = viz.contact_sheet(clip(), GRID, {"a": keep([8])}, cell_width=96, times=times + 1)
    rows = (timed != other).any((1, 2)).nonzero()[0]
    under = MARGIN + LABEL_HEIGHT + HEIGHT + GAP
    assert under <= rows.min()
    assert rows.max() < under + LABEL_HEIGHT, "the words alone"
    first, second = (
        next(viz.moving_frames(clip(), GRID, {"a": keep([8])}, times=t, panel_width=480)) for t in (times, times + 1)
    )
    assert (first != second).any()
    with pytest.raises(ValueError, match="times must be as many as the 10 frames, got 3"):
        viz.contact_sheet(clip(), GRID, {"a": keep([8])}, times=[0.0, 1.0, 2.0])


def test_moving_frames_follow_the_cells_and_have_even_sides() -> None:
    grid = VideoGrid(2, 4, 6)
    pictures = list(viz.moving_frames(clip(4), grid, {"a": keep([7], grid)}, panel_width=97))
    assert len(pictures) == 4
    assert {(p.shape[0] % 2, p.shape[1] % 2) for p in pictures} == {(0, 0)}
    inside = [p[MARGIN + LABEL_HEIGHT : MARGIN + LABEL_HEIGHT + 65, MARGIN : MARGIN + 97] for p in pictures]
    # Token 7 is in cell 0, that is frames 0 and 1: its patch is bright there and dark after.
    light = [int(p[20:28, 20:28].max()) for p in inside]
    assert min(light[:2]) > 190
    assert max(light[2:]) < 100


def test_panels_stand_side_by_side() -> None:
    def shape(number: int) -> tuple[int, ...]:
        picks = {str(i): keep([i]) for i in range(number)}
        return next(viz.moving_frames(clip(), GRID, picks, panel_width=96)).shape

    assert shape(2)[1] > shape(1)[1]
    assert shape(3)[0] == shape(1)[0]
    assert shape(4)[:2] == (shape(6)[0], shape(2)[1])


@pytest.mark.parametrize("name", ["out.png", "out.mp4"])
def test_files_decode_to_what_was_drawn(tmp_path: Path, name: str) -> None:
    import av

    x = torch.randn(GRID.t, GRID.tokens_per_frame, 8, generator=torch.Generator().manual_seed(0))
    picks = {name: select_tokens(x, 0.3, method=name) for name in ("evs", "holitom", "dycoke")}
    (tmp_path / name).write_bytes(b"old")
    path = viz.draw(tmp_path / name, clip(), GRID, picks)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if name.endswith("png"):
        drawn = [viz.contact_sheet(clip(), GRID, picks)]
        assert np.array_equal(decoded[0], drawn[0])
    else:
        drawn = list(viz.moving_frames(clip(), GRID, picks))
        error = np.abs(decoded[4].astype(int) - drawn[4].astype(int)).mean()
        assert error < 4, error
    assert len(decoded) == len(drawn)


@pytest.mark.parametrize("name", ["out.png", "out.mp4"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("score_vllm.viz.draw.os.replace", fail)
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        viz.draw(tmp_path / name, clip(), GRID, {"a": keep([0])})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"old")]


def test_wrong_arguments_are_refused_by_name(tmp_path: Path) -> None:
    picks = {"a": keep([0])}
    for path, message in [("a.gif", r"end in \.png or \.mp4, got '.*a\.gif'"), ("a", "end in")]:
        with pytest.raises(ValueError, match=message):
            viz.draw(tmp_path / path, clip(), GRID, picks)
    for frames, message in [
        (clip()[..., :2], r"\[F, H, W, 3\] uint8, got \(10, 64, 96, 2\)"),
        (clip().astype(np.float32), "uint8, got .* float32"),
        (clip(4), "at least as many as the grid's T=5, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            viz.draw(tmp_path / "a.png", frames, GRID, picks)
    with pytest.raises(ValueError, match=r"selection is of T=5, N=24, but the grid is T=5, N=4\*5=20"):
        viz.draw(tmp_path / "a.png", clip(), VideoGrid(5, 4, 5), picks)
    with pytest.raises(ValueError, match="at least one selection"):
        viz.draw(tmp_path / "a.png", clip(), GRID, {})
    with pytest.raises(ValueError, match=r"fps must be in \(0, 1000\], got 0"):
        viz.draw(tmp_path / "a.mp4", clip(), GRID, picks, fps=0)
    with pytest.raises(ValueError, match="max_cells must be >= 1"):
        viz.contact_sheet(clip(), GRID, picks, max_cells=0)
    with pytest.raises(ValueError, match="panel_width must be >= 16"):
        next(viz.moving_frames(clip(), GRID, picks, panel_width=2))
    assert not list(tmp_path.iterdir())
