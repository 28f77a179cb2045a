"""The parts of the pictures in :mod:`score_vllm.viz.draw`: dimmed and outlined patches, text, bars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# How much of a dropped patch shows, and how much of that is grey instead of colour.
DIM_LIGHT = 0.28
DIM_GREY = 0.75
BAR_SHOWN = (255, 179, 71)


@dataclass(frozen=True)
class Theme:
    """Colours of a picture (RGB), and the grey level that dropped patches fade to."""

    background: tuple[int, int, int]
    text: tuple[int, int, int]
    faint: tuple[int, int, int]
    bar: tuple[int, int, int]
    dropped: int


DARK = Theme((18, 19, 23), (232, 234, 238), (134, 139, 149), (88, 98, 118), 0)
LIGHT = Theme((255, 255, 255), (31, 35, 40), (101, 109, 118), (175, 184, 198), 255)
THEMES = {"dark": DARK, "light": LIGHT}
MARGIN = 12
GAP = 6
TEXT_SIZE = 15
LABEL_HEIGHT = 24
STRIP_HEIGHT = 52
# Kept patches get an outline, or they would not show in a dark scene; not where patches are tiny.
OUTLINE_STRENGTH = 0.55
OUTLINE_LEAST_PATCH = 7


def _pixels(kept: np.ndarray, frame: np.ndarray) -> np.ndarray:
    rows = np.arange(frame.shape[0]) * kept.shape[0] // frame.shape[0]
    columns = np.arange(frame.shape[1]) * kept.shape[1] // frame.shape[1]
    return kept[rows[:, None], columns[None, :]]


def outline_kept(frame: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """One frame with a thin line along the inner border of its kept regions.

    Args:
        frame: [H, W, 3] uint8.
        kept: [h, w] bool.

    Returns:
        [H, W, 3] uint8; the frame itself where patches are under 7 pixels wide or high.
    """
    if min(frame.shape[0] // kept.shape[0], frame.shape[1] // kept.shape[1]) < OUTLINE_LEAST_PATCH:
        return frame
    mask = np.pad(_pixels(kept, frame), 1, mode="edge")
    inside = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    line = (mask[1:-1, 1:-1] & ~inside)[..., None]
    mixed = (1 - OUTLINE_STRENGTH) * frame + OUTLINE_STRENGTH * np.array(BAR_SHOWN)
    return np.where(line, np.rint(mixed).astype(np.uint8), frame)


def dim_dropped(frame: np.ndarray, kept: np.ndarray, theme: Theme = DARK) -> np.ndarray:
    """One frame with its dropped patches faded and nearly grey.

    Args:
        frame: [H, W, 3] uint8.
        kept: [h, w] bool; patch borders are rounded where h or w does not divide the frame.
        theme: says what dropped patches fade to.

    Returns:
        [H, W, 3] uint8; kept patches are unchanged.
    """
    mask = _pixels(kept, frame)[..., None]
    colour = frame.astype(np.float32)
    grey = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    dimmed = DIM_LIGHT * (DIM_GREY * grey[..., None] + (1 - DIM_GREY) * colour) + (1 - DIM_LIGHT) * theme.dropped
    return np.where(mask, frame, np.rint(dimmed).astype(np.uint8))


def text(canvas: Image.Image, xy: tuple[float, float], text: str, width: float, colour: tuple[int, int, int]) -> None:
    """Write one line at ``xy``, shortened to ``width`` pixels."""
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT_SIZE)
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text[:-2].rstrip() + "…"
    draw.text(xy, text, fill=colour, font=font)


def strip(
    canvas: Image.Image,
    box: tuple[int, int, int, int],
    counts: np.ndarray,
    top: int,
    shown: Iterable[int],
    theme: Theme = DARK,
) -> None:
    """Bars of kept tokens per temporal cell, the cells shown in another colour."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(canvas)
    left, upper, right, lower = box
    width, height, shown = right - left, lower - upper, set(shown)
    space = 1 if width / len(counts) >= 3 else 0
    for t, count in enumerate(counts.tolist()):
        start, stop = left + width * t // len(counts), left + width * (t + 1) // len(counts)
        size = max(1, round(height * count / top)) if count else 0
        if size:
            colour = BAR_SHOWN if t in shown else theme.bar
            draw.rectangle((start, lower - size, max(start, stop - 1 - space), lower - 1), fill=colour)
    draw.line((left, lower, right - 1, lower), fill=theme.faint)


def picture(frame: np.ndarray, size: tuple[int, int], kept: np.ndarray | None, theme: Theme = DARK) -> Image.Image:
    """A frame at the size drawn; scaled first, so that patch borders stay sharp."""
    from PIL import Image

    scaled = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    if kept is None:
        return scaled
    return Image.fromarray(outline_kept(dim_dropped(np.asarray(scaled), kept, theme), kept))
