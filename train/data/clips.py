"""From a video file or a folder of frames to the frames that training sees; sizes of pictures."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from score_vllm.train.data.config import DEFAULT_MAX_PIXELS
from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.video import DecodeLimits
from score_vllm.video.container import VideoError
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, choose
from score_vllm.video.sandbox import decode_video_isolated

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# LLaVA-Hound's frame folders (LLaVA-Video-178K) hold two frames per second.
FOLDER_FPS = 2.0
# Qwen2.5-VL's patch times its merge: a frame of such sides passes the model's processor at its own size.
SIDE_MULTIPLE = 28
MIN_FRAMES = 2


@dataclass(frozen=True, eq=False)
class Clip:
    """frames: [F, H, W, 3] uint8 RGB, F >= 2; fps: of these frames, as transformers' ``sampled_fps`` has it."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class ClipReader:
    """Reads clips by the same rule as serving (:func:`~score_vllm.video.sampling.choose`).

    Attributes:
        fps: frames per second to read.
        max_frames: most frames to read.
        max_pixels: frames above this are made smaller, keeping their shape.
        limits: what one file may cost; the decoder runs in a process of its own, so that no file can end training.
    """

    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    max_pixels: int = DEFAULT_MAX_PIXELS
    limits: DecodeLimits = field(default_factory=DecodeLimits)

    def read(self, path: Path, name: str, start: float | None = None, end: float | None = None) -> Clip:
        """Frames of a video file, or of a folder of pictures.

        A one-frame video gives two copies of it, as the model's processor would make them.

        Args:
            path: file or folder.
            name: of the sample, for the error.
            start, end: seconds to read; None where the video begins and ends.

        Returns:
            The clip; see :class:`Clip`.

        Raises:
            BrokenSampleError: the file is missing, damaged, above a limit, or not a video.
        """
        try:
            clip = self._folder(path, start, end) if path.is_dir() else self._file(path, start, end)
        except VideoError as error:
            raise BrokenSampleError(f"{name}: {path}: {error}") from error
        except OSError as error:
            raise BrokenSampleError(f"{name}: cannot read {path}: {error.strerror or error}") from error
        frames = _shrink(clip.frames, self.max_pixels)
        if len(frames) < MIN_FRAMES:
            frames = np.repeat(frames, MIN_FRAMES, axis=0)
        return Clip(frames, clip.fps)

    def _file(self, path: Path, start: float | None, end: float | None) -> Clip:
        if path.stat().st_size > self.limits.max_bytes:
            raise VideoError(
                f"the video has {path.stat().st_size} bytes, more than max_bytes = {self.limits.max_bytes}"
            )
        video = decode_video_isolated(
            path.read_bytes(), fps=self.fps, max_frames=self.max_frames, start=start, end=end, limits=self.limits
        )
        return Clip(video.frames, 1 / video.step)

    def _folder(self, path: Path, start: float | None, end: float | None) -> Clip:
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES), key=_by_number)
        if not files:
            raise VideoError(f"the folder has no frames ({', '.join(PICTURE_SUFFIXES)})")
        stamps = np.arange(len(files)) / FOLDER_FPS
        sample = choose(stamps, len(files) / FOLDER_FPS, fps=self.fps, max_frames=self.max_frames, start=start, end=end)
        first = _read_frame(files[sample.indices[0]], self.limits)
        size = fit_within(first.shape[0], first.shape[1], self.max_pixels)
        frames = np.empty((len(sample.indices), *size, 3), np.uint8)
        for i, at in enumerate(sample.indices):
            frames[i] = letterbox(first if i == 0 else _read_frame(files[at], self.limits), size)
        return Clip(frames, 1 / sample.step)


def decode_picture(data: bytes, max_pixels: int) -> np.ndarray:
    """An encoded picture, upright.

    Args:
        data: JPEG, PNG, WebP, GIF (first frame) or BMP.
        max_pixels: pictures above this are refused before they are decoded.

    Returns:
        [H, W, 3] uint8 RGB.

    Raises:
        ValueError: not such a picture, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"the picture has {image.width}x{image.height} pixels, more than {max_pixels}")
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their parsers stumble over
        raise ValueError(f"the picture cannot be decoded: {' '.join(str(error).split())[:160]}") from error


def fit_within(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Size of a frame of at most ``max_pixels``: its own where it is small enough, else scaled down to sides that
    are multiples of 28, so that the model's processor does not resample it again.

    Returns:
        ``(height, width)``, both >= 1.
    """
    if height * width <= max_pixels:
        return height, width
    scale = math.sqrt(max_pixels / (height * width))

    def side(length: float) -> int:
        return max(SIDE_MULTIPLE, int(length) // SIDE_MULTIPLE * SIDE_MULTIPLE)

    # A side that was lifted to 28 leaves less room for the other one.
    new_height = side(min(height * scale, max_pixels / SIDE_MULTIPLE))
    return new_height, side(min(width * scale, max_pixels / new_height))


def letterbox(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture scaled to fit into ``size`` with its shape kept, black bars on the rest, as players show it.

    Args:
        picture: [H, W, 3] uint8.
        size: ``(height, width)``.

    Returns:
        [height, width, 3] uint8; the picture itself where it has that size.
    """
    height, width = size
    if picture.shape[:2] == size:
        return picture
    scale = min(height / picture.shape[0], width / picture.shape[1])
    inner = (max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
    out = np.zeros((height, width, 3), np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    out[top : top + inner[0], left : left + inner[1]] = _resize(picture, inner)
    return out


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """Frames as an H.264 mp4, for those who take files only; an odd side gets one more row or column.

    Args:
        frames: [F, H, W, 3] uint8 RGB.
        fps: frames per second, > 0.

    Returns:
        The file's bytes.
    """
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    return sink.getvalue()


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _shrink(frames: np.ndarray, max_pixels: int) -> np.ndarray:
    size = fit_within(frames.shape[1], frames.shape[2], max_pixels)
    if size == frames.shape[1:3]:
        return frames
    out = np.empty((len(frames), *size, 3), np.uint8)
    for i, picture in enumerate(frames):
        out[i] = _resize(picture, size)
    return out


def _read_frame(path: Path, limits: DecodeLimits) -> np.ndarray:
    try:
        return decode_picture(path.read_bytes(), limits.max_pixels)
    except ValueError as error:
        raise VideoError(f"frame {path.name}: {error}") from error


def _by_number(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.stem)], path.name
