"""From a decoded frame to the picture a player shows: orientation, square pixels, size, RGB."""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation

from score_vllm.video.container import DecodeLimits, VideoError

_UPRIGHT = (1, 0, 0, 1)
# Scaling and chroma interpolation at full precision; bicubic as the models' processors scale.
_SCALE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
# Above this the shape is a defect of the header.
_MAX_SAMPLE_ASPECT = 10
# Qwen's processors refuse longer shapes.
_MAX_ASPECT = 200
# Video processors whose limits are of all frames together.
_WHOLE_VIDEO = ("Qwen3VLVideoProcessor", "Glm4vVideoProcessor", "Glm46VVideoProcessor")


@dataclass(frozen=True, slots=True)
class Resize:
    """The size that a model's video processor will choose, so that decoding delivers it.

    Attributes:
        factor: sides are multiples of it (patch size times merge size).
        min_pixels, max_pixels: of a frame, or of all frames together where ``whole_video``.
        whole_video: Qwen3-VL's and GLM's rule; else Qwen2-VL's and Qwen2.5-VL's.
        temporal_factor: frames per temporal patch.
        token_cap: ``max_video_tokens`` of a processor with ``cap_pixels_per_frame``; 0: no cap.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    whole_video: bool = False
    temporal_factor: int = 2
    token_cap: int = 0

    @classmethod
    def for_processor(cls, processor: Any) -> Resize | None:
        """The rule of a transformers video processor; None for a kind that is not known (frames stay unscaled)."""
        kind = type(processor).__name__
        if kind not in ("Qwen2VLVideoProcessor", *_WHOLE_VIDEO) or not processor.do_resize:
            return None
        return cls(
            factor=processor.patch_size * processor.merge_size,
            min_pixels=int(processor.size["shortest_edge"]),
            max_pixels=int(processor.size["longest_edge"]),
            whole_video=kind in _WHOLE_VIDEO,
            temporal_factor=processor.temporal_patch_size,
            token_cap=int(processor.max_video_tokens) if getattr(processor, "cap_pixels_per_frame", False) else 0,
        )

    def to_json(self) -> dict[str, Any]:
        """Keyword arguments of the class."""
        return asdict(self)

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """``(height, width)`` for a video of ``frames`` frames of that size; source: transformers' ``smart_resize``.

        Raises:
            VideoError: one side is more than 200 times the other.
        """
        if self.whole_video and min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise VideoError(
                f"the video's frames are {width}x{height}: the longer side may be at most {_MAX_ASPECT} times the other"
            )
        least, most = self.min_pixels, self.max_pixels
        if self.token_cap:
            unit = self.token_cap * self.factor**2
            floor = int(least * 1.05)
            if self.whole_video:
                most = max(min(unit, most // frames), floor) * frames
            else:
                most = max(min(most, int(unit * 0.9) * self.temporal_factor // frames), floor)
        # Qwen3-VL counts the pixels of all frames, those of a rounded number of them first.
        exact = frames if self.whole_video else 1
        rounded = round(frames / self.temporal_factor) * self.temporal_factor if self.whole_video else 1
        new = [round(side / self.factor) * self.factor for side in (height, width)]
        if rounded * new[0] * new[1] > most:
            beta = math.sqrt(exact * height * width / most)
            new = [max(self.factor, math.floor(side / beta / self.factor) * self.factor) for side in (height, width)]
        elif rounded * new[0] * new[1] < least:
            beta = math.sqrt(least / (exact * height * width))
            new = [math.ceil(side * beta / self.factor) * self.factor for side in (height, width)]
        return new[0], new[1]


def orientation(frame: Any) -> tuple[int, int, int, int]:
    """``(a, b, c, d)`` in {-1, 0, 1} of the frame's display matrix: x' = a x + c y, y' = b x + d y.

    Angles that are no multiple of 90 degrees are left alone.
    """
    matrix = next((bytes(item) for item in frame.side_data if item.type == SideDataType.DISPLAYMATRIX), None)
    if matrix is None or len(matrix) < 36:
        return _UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
    signs = tuple((v > 0) - (v < 0) for v in (a, b, c, d))
    straight = (signs[1] == signs[2] == 0 and signs[0] and signs[3]) or (
        signs[0] == signs[3] == 0 and signs[1] and signs[2]
    )
    return signs if straight else _UPRIGHT  # type: ignore[return-value]


def turn(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A [H, W, 3] picture as its display matrix says."""
    a, b, c, d = matrix
    if a == 0:  # x' comes from y and the other way round
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    return picture[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]


class Painter:
    """Frames to RGB pictures of one size, that of the first frame; later ones of another size are fitted into it.

    Args:
        count: frames that will be delivered.
        resize: the model's rule; None: the size that a player shows.
        sample_aspect: width of a pixel over its height, as the stream has it.
        limits: max_pixels and max_output_bytes.
    """

    def __init__(self, count: int, resize: Resize | None, sample_aspect: Fraction | None, limits: DecodeLimits) -> None:
        self._count = count
        self._resize = resize
        self._aspect = self._sane(sample_aspect)
        self._limits = limits
        self._first: tuple[int, int] | None = None  # coded size
        self.display = (0, 0)  # height, width
        self.size = (0, 0)
        self.fitted = 0
        self.interlaced = False

    @staticmethod
    def _sane(aspect: Fraction | None) -> Fraction:
        if not aspect or not 1 / _MAX_SAMPLE_ASPECT <= aspect <= _MAX_SAMPLE_ASPECT:
            return Fraction(1)
        return Fraction(aspect)

    def _shown_size(self, frame: Any, turned: bool) -> tuple[int, int]:
        """Square pixels: the side that is too short grows."""
        width, height = Fraction(frame.width), Fraction(frame.height)
        if self._aspect > 1:
            width *= self._aspect
        else:
            height /= self._aspect
        size = max(1, round(height)), max(1, round(width))
        return (size[1], size[0]) if turned else size

    def start(self, frame: Any) -> tuple[int, int]:
        """Fix the size by the first frame delivered.

        Returns:
            ``(height, width)`` of the pictures.

        Raises:
            VideoError: a limit.
        """
        self.display = self._shown_size(frame, orientation(frame)[0] == 0)
        height, width = self._resize.size(self._count, *self.display) if self._resize else self.display
        needed = height * width * 3 * self._count
        if height * width > self._limits.max_pixels:
            raise VideoError(f"the video is {width}x{height}, more than max_pixels = {self._limits.max_pixels}")
        if needed > self._limits.max_output_bytes:
            raise VideoError(
                f"{self._count} frames of {width}x{height} pixels are more than "
                f"max_output_bytes = {self._limits.max_output_bytes}; ask for fewer frames"
            )
        self._first = (frame.width, frame.height)
        self.size = (height, width)
        return self.size

    def paint(self, frame: Any, out: np.ndarray) -> None:
        """Write a frame's picture into ``out`` [height, width, 3].

        Raises:
            VideoError: the frame is above ``max_pixels``.
        """
        if frame.width * frame.height > self._limits.max_pixels:
            raise VideoError(
                f"a frame of the video is {frame.width}x{frame.height}, more than "
                f"max_pixels = {self._limits.max_pixels}"
            )
        self.interlaced = self.interlaced or frame.interlaced_frame
        matrix = orientation(frame)
        turned = matrix[0] == 0
        if (frame.width, frame.height) == self._first:
            out[:] = turn(_rgb(frame, self.size, turned), matrix)
            return
        self.fitted += 1
        shown = self._shown_size(frame, turned)
        scale = min(self.size[0] / shown[0], self.size[1] / shown[1])
        inner = (
            min(self.size[0], max(1, round(shown[0] * scale))),
            min(self.size[1], max(1, round(shown[1] * scale))),
        )
        top, left = (self.size[0] - inner[0]) // 2, (self.size[1] - inner[1]) // 2
        out[:] = 0
        out[top : top + inner[0], left : left + inner[1]] = turn(_rgb(frame, inner, turned), matrix)


def _rgb(frame: Any, size: tuple[int, int], turned: bool) -> np.ndarray:
    """[h, w, 3] uint8 before turning, so that it has ``size`` after it."""
    height, width = (size[1], size[0]) if turned else size
    same = (frame.width, frame.height) == (width, height)
    clear = any(component.is_alpha for component in frame.format.components)
    # Untagged colour is taken as BT.601, as FFmpeg and all loaders built on it do.
    picture = frame.to_ndarray(
        format="rgba" if clear else "rgb24",
        width=width,
        height=height,
        interpolation=None if same else _SCALE,
        threads=1,
    )
    if not clear:
        return picture
    return (picture[..., :3].astype(np.uint16) * picture[..., 3:] // 255).astype(np.uint8)  # on black
