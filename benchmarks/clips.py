"""Clips for benchmarks: seeded, every one different, the same on every machine with the same encoder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

# Frames per second of every clip.
FPS = 2


@dataclass(frozen=True)
class ClipShape:
    """Size of a clip; at 2 frames per second the server's sampling rule reads every frame.

    Attributes:
        frames: number of frames, even, at least 4.
        height: pixels.
        width: pixels.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 4 or self.frames % 2:
            raise ValueError(f"frames must be an even number >= 4, got {self.frames}")
        for name in ("height", "width"):
            if getattr(self, name) < 28 or getattr(self, name) % 2:
                raise ValueError(f"{name} must be an even number >= 28, got {getattr(self, name)}")

    @property
    def visual_tokens(self) -> int:
        """Merged tokens of Qwen2.5-VL at this size, as long as the processor does not shrink the frames."""
        return self.frames // 2 * -(-self.height // 28) * -(-self.width // 28)

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}"


def draw_frames(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """[F, H, W, 3] uint8: a textured ground and a square that crosses it; every seed is another picture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 160, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    ground = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    frames = np.repeat(ground[None], count, axis=0)
    side = max(1, height // 4)
    top = int(rng.integers(0, height - side))
    colour = rng.integers(160, 256, 3)
    for i in range(count):
        left = max(0, width - side) * i // (count - 1)
        frames[i, top : top + side, left : left + side] = colour
    return frames


def write_frames(path: Path, frames: np.ndarray, gop_size: int = 12) -> Path:
    """Encode [F, H, W, 3] uint8 (MPEG-4 part 2, :data:`FPS` frames per second), atomically."""
    import av

    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        with av.open(name, "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(FPS))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.gop_size = gop_size
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def write_clip(path: Path, shape: ClipShape, seed: int) -> Path:
    """Encode one clip, atomically."""
    return write_frames(path, draw_frames(shape.frames, shape.height, shape.width, seed))


def write_clips(folder: Path, shape: ClipShape, seeds: Sequence[int]) -> list[Path]:
    """One clip per seed in ``folder``, with a progress bar; files that are there already stay."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in tqdm(seeds, desc=f"clips ({shape})", unit="clip", leave=False):
        path = folder / f"clip-{shape.frames}x{shape.height}x{shape.width}-{seed}.mp4"
        paths.append(path if path.is_file() else write_clip(path, shape, seed))
    return paths
