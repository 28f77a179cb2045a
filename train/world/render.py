"""Paints scenes of :mod:`score_vllm.train.world.scenes`, and says which pixel shows what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from score_vllm.train.world.scenes import COLOURS, FPS, FRAME_SIZE, LETTERS, PLATE_SIZE, Scene

# 5 x 7 bitmaps, a row per number, the high bit to the left.
GLYPHS = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "X": (17, 17, 10, 4, 10, 17, 17),
}
# In the map of what is seen: 0 is ground, 1.. are the scene's things, FIRST_FLASH.. its flashes.
FIRST_FLASH = 100


@dataclass(frozen=True)
class Rendering:
    """A painted scene.

    Attributes:
        frames: [F, H, W, 3] uint8 RGB.
        seen: [F, H, W] uint8: 0 ground, i + 1 for thing i, ``FIRST_FLASH + i`` for flash i.
    """

    frames: np.ndarray
    seen: np.ndarray


def render(scene: Scene) -> Rendering:
    """Paint a scene.

    Args:
        scene: any.

    Returns:
        Frames and the map of what each pixel shows; the same for equal scenes.
    """
    rng = np.random.default_rng(scene.seed)
    frames = np.empty((scene.num_frames, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    seen = np.zeros((scene.num_frames, FRAME_SIZE, FRAME_SIZE), np.uint8)
    edges = [0, *scene.cuts, scene.num_frames]
    for start, stop in pairwise(edges):
        frames[start:stop] = _ground(rng)
        # Stills of a pseudo-video are identical frames; a real scene has things that move and do not matter.
        if not scene.texts:
            _water(rng, frames[start:stop])
            _leaves(rng, frames[start:stop])
    for i, thing in enumerate(scene.things):
        mask = shape_mask(thing.shape, thing.size)
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, 3)
        paint = np.clip(colour, 0, 255).astype(np.uint8)
        for f in range(thing.start, thing.stop):
            x, y = thing.box(f)
            frames[f, y : y + thing.size, x : x + thing.size][mask] = paint
            seen[f, y : y + thing.size, x : x + thing.size][mask] = i + 1
    for i, flash in enumerate(scene.flashes):
        rows, columns = slice(flash.y, flash.y + PLATE_SIZE), slice(flash.x, flash.x + PLATE_SIZE)
        frames[flash.start : flash.stop, rows, columns] = plate(flash.letter)
        seen[flash.start : flash.stop, rows, columns] = FIRST_FLASH + i
    return Rendering(frames, seen)


@lru_cache(maxsize=512)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """[size, size] bool: the pixels of a shape in its box.

    Raises:
        ValueError: the shape is unknown.
    """
    v, u = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    radius = np.hypot(u, v)
    if shape == "circle":
        return radius < 0.95
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.82
    if shape == "triangle":
        return (v < 0.85) & (abs(u) < (v + 0.95) * 0.52)
    if shape == "star":
        return radius < 0.68 + 0.28 * np.cos(5 * (np.arctan2(u, -v)))
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 0.95)
    if shape == "ring":
        return (radius < 0.95) & (radius > 0.52)
    raise ValueError(f"shape {shape!r} is unknown")


@lru_cache(maxsize=2 * len(LETTERS))
def plate(letter: str, size: int = PLATE_SIZE) -> np.ndarray:
    """[size, size, 3] uint8: a white letter on a black plate."""
    bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in GLYPHS[letter]], np.uint8)
    dot = size // 8
    big = bits.repeat(dot, axis=0).repeat(dot, axis=1) * 235
    out = np.full((size, size, 3), 10, np.uint8)
    top, left = (size - 7 * dot) // 2, (size - 5 * dot) // 2
    out[top : top + 7 * dot, left : left + 5 * dot] += big[..., None]
    return out


def _ground(rng: np.random.Generator) -> np.ndarray:
    """A muted texture, [H, W, 3] uint8: sky over earth, lit from the left, so that a place can be told by sight."""
    picture = np.empty((FRAME_SIZE, FRAME_SIZE, 3), np.float32)
    half = FRAME_SIZE // 2
    picture[:half] = rng.uniform(115, 150) + rng.uniform(-8, 8, 3) + np.array([-6, 0, 10])
    picture[half:] = rng.uniform(70, 105) + rng.uniform(-8, 8, 3) + np.array([8, 2, -8])
    for cell in (7, 28):
        count = FRAME_SIZE // cell
        grain = rng.uniform(-12, 12, (count, count, 1)).repeat(cell, axis=0).repeat(cell, axis=1)
        picture += grain
    picture += np.linspace(22, -22, FRAME_SIZE)[None, :, None]
    return np.clip(picture, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    grey = np.random.default_rng(7).integers(60, 160, (2 * FRAME_SIZE // 4, 2 * FRAME_SIZE // 4, 1), dtype=np.uint8)
    return (grey.repeat(4, axis=0).repeat(4, axis=1) + np.array([0, 5, 12], np.uint8)).astype(np.uint8)


def _water(rng: np.random.Generator, frames: np.ndarray) -> None:
    """Up to two rectangles that flicker in every frame."""
    for _ in range(int(rng.integers(0, 3))):
        height, width = (int(v) for v in rng.integers(40, 90, 2))
        x, y = int(rng.integers(0, FRAME_SIZE - width)), int(rng.integers(0, FRAME_SIZE - height))
        for picture in frames:
            u, v = (int(s) for s in rng.integers(0, FRAME_SIZE, 2))
            picture[y : y + height, x : x + width] = _noise()[v : v + height, u : u + width]


def _leaves(rng: np.random.Generator, frames: np.ndarray) -> None:
    """Up to three grey discs that drift at random."""
    for _ in range(int(rng.integers(0, 4))):
        size = int(rng.integers(18, 34))
        mask = shape_mask("circle", size)
        shade = int(rng.integers(30, 200))
        place = rng.uniform(0, FRAME_SIZE - size, 2)
        pace = rng.uniform(-6, 6, 2)
        for picture in frames:
            place = np.clip(place + pace + rng.uniform(-3, 3, 2), 0, FRAME_SIZE - size)
            x, y = (int(v) for v in place)
            picture[y : y + size, x : x + size][mask] = shade


def write_clip(frames: np.ndarray, path: Path, fps: float = FPS) -> None:
    """Write frames as an H.264 mp4.

    Args:
        frames: [F, H, W, 3] uint8, H and W even.
        path: of the file.
        fps: frames per second, whole.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "12", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
