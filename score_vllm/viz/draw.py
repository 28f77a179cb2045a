"""Pictures of what a method keeps: kept patches as they are, dropped ones faded (paper, figure 5).

Needs Pillow, and PyAV for MP4; neither is imported before something is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from score_vllm.files import write_atomically
from score_vllm.types import TokenSelection, VideoGrid
from score_vllm.viz.paint import DARK, GAP, LABEL_HEIGHT, MARGIN, STRIP_HEIGHT, Theme, picture, strip, text

# Shape of the places that pictures are drawn in, whatever the video's.
MOST_HEIGHT = 2
LEAST_HEIGHT = 8
LEAST_CELL_WIDTH, MOST_CELL_WIDTH = 16, 4096


class Shown(NamedTuple):
    """What a picture is drawn of.

    Attributes:
        frames: [F, H, W, 3] uint8, F >= T.
        times: [F] seconds of the frames; None: they are not known.
        grid: T, h, w of the video's tokens.
        selections: label -> selection.
    """

    frames: np.ndarray
    times: Sequence[float] | np.ndarray | None
    grid: VideoGrid
    selections: dict[str, TokenSelection]


def kept_masks(grid: VideoGrid, selection: TokenSelection) -> np.ndarray:
    """Which patches a selection keeps; a merged row counts for the patch whose place it takes.

    Args:
        grid: T, h, w of the video's tokens.
        selection: of that video.

    Returns:
        [T, h, w] bool.

    Raises:
        ValueError: the selection is of another grid.
    """
    if (selection.num_frames, selection.tokens_per_frame) != (grid.t, grid.tokens_per_frame):
        raise ValueError(
            f"selection is of T={selection.num_frames}, N={selection.tokens_per_frame}, "
            f"but the grid is T={grid.t}, N={grid.h}*{grid.w}={grid.tokens_per_frame}"
        )
    mask = np.zeros(grid.num_tokens, dtype=bool)
    mask[selection.indices.cpu().numpy()] = True
    return mask.reshape(grid.t, grid.h, grid.w)


def _check(
    frames: np.ndarray,
    grid: VideoGrid,
    selections: Mapping[str, TokenSelection],
    times: Sequence[float] | np.ndarray | None,
) -> dict[str, np.ndarray]:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames must be non-empty [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
    if frames.shape[0] < grid.t:
        raise ValueError(f"frames must be at least as many as the grid's T={grid.t}, got {frames.shape[0]}")
    if times is not None and len(times) != len(frames):
        raise ValueError(f"times must be as many as the {len(frames)} frames, got {len(times)}")
    if not selections:
        raise ValueError("selections must name at least one selection, got none")
    return {label: kept_masks(grid, selection) for label, selection in selections.items()}


def _caption(label: str, mask: np.ndarray) -> str:
    kept = int(mask.sum())
    return f"{label}   {100 * kept / mask.size:.1f} %   {kept} of {mask.size} tokens"


def _fit(width: int, frames: np.ndarray) -> tuple[int, int]:
    """``(width, height)`` of a picture in a place ``width`` wide: at most twice as high, at least 8 pixels."""
    height, actual = frames.shape[1:3]
    scale = min(width / actual, MOST_HEIGHT * width / height)
    return max(1, round(actual * scale)), max(LEAST_HEIGHT, round(height * scale))


def contact_sheet(
    frames: np.ndarray,
    grid: VideoGrid,
    selections: Mapping[str, TokenSelection],
    *,
    times: Sequence[float] | np.ndarray | None = None,
    max_cells: int = 8,
    cell_width: int = 224,
    theme: Theme = DARK,
) -> np.ndarray:
    """A still picture: the video, then one row per method with a strip of kept tokens per temporal cell.

    Args:
        frames: [F, H, W, 3] uint8, F >= T; a cell is shown by the first of its frames.
        grid: T, h, w of the video's tokens.
        selections: label -> selection, drawn in this order.
        times: [F] seconds of the frames, written under the cells; None: nothing is written.
        max_cells: cells to show, at least 1: the clip in as many equal parts, of each the cell that keeps the most.
        cell_width: width of each in pixels, in [16, 4096].
        theme: colours.

    Returns:
        [height, width, 3] uint8. All strips share one scale; the bars of the cells shown stand out.

    Raises:
        ValueError: a shape does not fit, or a number is out of range.
    """
    from PIL import Image

    masks = _check(frames, grid, selections, times)
    if max_cells < 1 or not LEAST_CELL_WIDTH <= cell_width <= MOST_CELL_WIDTH:
        raise ValueError(
            f"max_cells must be >= 1 and cell_width in [{LEAST_CELL_WIDTH}, {MOST_CELL_WIDTH}], got {max_cells} and "
            f"{cell_width}"
        )
    number = min(max_cells, grid.t)
    fullness = sum(mask.sum(axis=(1, 2)) for mask in masks.values())
    cells = [int(part[fullness[part].argmax()]) for part in np.array_split(np.arange(grid.t), number)]
    firsts = [-(-t * len(frames) // grid.t) for t in cells]
    size = _fit(cell_width, frames)
    inner = number * cell_width + (number - 1) * GAP
    row = LABEL_HEIGHT + size[1] + GAP + STRIP_HEIGHT + 2 * GAP
    head = LABEL_HEIGHT + size[1] + 2 * GAP + (0 if times is None else LABEL_HEIGHT)
    canvas = Image.new("RGB", (inner + 2 * MARGIN, 2 * MARGIN + head + len(masks) * row), theme.background)

    def paint(y: int, caption: str, kept: np.ndarray | None) -> int:
        text(canvas, (MARGIN, y), caption, inner, theme.text)
        for i, t in enumerate(cells):
            shot = picture(frames[firsts[i]], size, None if kept is None else kept[t], theme)
            canvas.paste(shot, (MARGIN + i * (cell_width + GAP) + (cell_width - size[0]) // 2, y + LABEL_HEIGHT))
        return y + LABEL_HEIGHT + size[1] + GAP

    top = max(1, *(int(mask.sum(axis=(1, 2)).max()) for mask in masks.values()))
    shown = ", ".join(str(t) for t in cells)
    # What a narrow picture cuts off stands last: the times under the frames name the cells, too.
    title = f"video   {grid.t} x {grid.h} x {grid.w} tokens   strips: kept per cell, 0 to {top}"
    title += f"   the fullest cells {shown}"
    y = paint(MARGIN, title, None) + GAP
    if times is not None:
        for i, first in enumerate(firsts):
            text(canvas, (MARGIN + i * (cell_width + GAP), y - GAP), f"{times[first]:.2f} s", cell_width, theme.text)
        y += LABEL_HEIGHT
    for label, mask in masks.items():
        y = paint(y, _caption(label, mask), mask)
        strip(canvas, (MARGIN, y, MARGIN + inner, y + STRIP_HEIGHT), mask.sum(axis=(1, 2)), top, cells, theme)
        y += STRIP_HEIGHT + 2 * GAP
    return np.asarray(canvas)


def moving_frames(
    frames: np.ndarray,
    grid: VideoGrid,
    selections: Mapping[str, TokenSelection],
    *,
    times: Sequence[float] | np.ndarray | None = None,
    panel_width: int = 480,
    columns: int | None = None,
    theme: Theme = DARK,
) -> Iterator[np.ndarray]:
    """A moving picture, frame by frame: the methods side by side, the strip marking the present cell.

    Args:
        frames: [F, H, W, 3] uint8, F >= T; frame f belongs to cell ``f * T // F``.
        grid: T, h, w of the video's tokens.
        selections: label -> selection, drawn in this order.
        times: [F] seconds of the frames, written beside each method's numbers; None: nothing is written.
        panel_width: width of a method's panel in pixels, at least 16.
        columns: panels beside each other before the next line, at least 1; None: up to three, four as 2 x 2.
        theme: colours.

    Yields:
        [height, width, 3] uint8, F times; height and width are even, as video encoders want them.

    Raises:
        ValueError: a shape does not fit, or a number is out of range.
    """
    from PIL import Image

    masks = _check(frames, grid, selections, times)
    if columns is None:
        columns = len(masks) if len(masks) < 4 else 2 if len(masks) == 4 else 3
    if panel_width < 16 or columns < 1:
        raise ValueError(f"panel_width must be >= 16 and columns >= 1, got {panel_width} and {columns}")
    size = _fit(panel_width, frames)
    columns = min(columns, len(masks))
    panel = LABEL_HEIGHT + size[1] + GAP + STRIP_HEIGHT + 2 * GAP
    width = 2 * MARGIN + columns * panel_width + (columns - 1) * MARGIN
    height = 2 * MARGIN + -(-len(masks) // columns) * panel
    empty = Image.new("RGB", (width + width % 2, height + height % 2), theme.background)
    top = max(1, *(int(mask.sum(axis=(1, 2)).max()) for mask in masks.values()))
    for f, frame in enumerate(frames):
        t = f * grid.t // len(frames)
        canvas = empty.copy()
        for i, (label, mask) in enumerate(masks.items()):
            x = MARGIN + i % columns * (panel_width + MARGIN)
            y = MARGIN + i // columns * panel
            caption = _caption(label, mask) if times is None else f"{_caption(label, mask)}   {times[f]:.2f} s"
            text(canvas, (x, y), caption, panel_width, theme.text)
            shot = picture(frame, size, mask[t], theme)
            canvas.paste(shot, (x + (panel_width - size[0]) // 2, y + LABEL_HEIGHT))
            y += LABEL_HEIGHT + size[1] + GAP
            strip(canvas, (x, y, x + panel_width, y + STRIP_HEIGHT), mask.sum(axis=(1, 2)), top, [t], theme)
        yield np.asarray(canvas)


def _write_mp4(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for i, image in enumerate(pictures):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def draw(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    grid: VideoGrid,
    selections: Mapping[str, TokenSelection],
    *,
    times: Sequence[float] | np.ndarray | None = None,
    fps: float = 8.0,
    cell_width: int = 224,
    theme: Theme = DARK,
) -> Path:
    """Draw selections over the frames of their video into a ``.png`` or ``.mp4`` file.

    Args:
        path: where to; an existing file is replaced once the new one is complete.
        frames: [F, H, W, 3] uint8, F >= T.
        grid: T, h, w of the video's tokens.
        selections: label -> selection; drawn side by side.
        times: [F] seconds of the frames, written into the picture; None: nothing is written.
        fps: frames per second of an MP4, in (0, 1000].
        cell_width: pixels per cell of a PNG, in [16, 4096].
        theme: colours.

    Returns:
        The path.

    Raises:
        ValueError: the ending is neither, or a shape or number does not fit.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".mp4"):
        raise ValueError(f"path must end in .png or .mp4, got {str(path)!r}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps must be in (0, 1000], got {fps!r}")
    _check(frames, grid, selections, times)
    if path.suffix.lower() == ".mp4":
        write_atomically(
            path, lambda part: _write_mp4(part, moving_frames(frames, grid, selections, times=times, theme=theme), fps)
        )
    else:
        from PIL import Image

        sheet = Image.fromarray(
            contact_sheet(frames, grid, selections, times=times, cell_width=cell_width, theme=theme)
        )
        write_atomically(path, lambda part: sheet.save(part, format="PNG"))
    return path
