"""Animated WebP, which FFmpeg does not read: times from its chunks, pictures from Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from score_vllm.video.container import Deadline, DecodeLimits, VideoError
from score_vllm.video.timeline import CUT, Timeline

# What browsers show a picture for that asks for less than a hundredth of a second.
_SHORTEST_MS, _INSTEAD_MS = 11, 100


def is_webp(data: bytes | memoryview) -> bool:
    """Whether it is a WebP file, still or animated."""
    return bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WEBP"


def _chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, int]]:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield bytes(data[at : at + 4]), at + 8
        at += 8 + size + size % 2


class WebPSource:
    """Timeline and pictures of a WebP file; the interface of :class:`~score_vllm.video.walk.Walker`.

    Raises:
        VideoError: not such a file, or a limit.
    """

    def __init__(self, data: bytes | memoryview, limits: DecodeLimits, deadline: Deadline) -> None:
        from PIL import Image

        durations = [int.from_bytes(data[at + 12 : at + 15], "little") for name, at in _chunks(data) if name == b"ANMF"]
        durations = [d if d >= _SHORTEST_MS else _INSTEAD_MS for d in durations] or [_INSTEAD_MS]
        if len(durations) > limits.max_source_frames:
            raise VideoError(f"the video has more than max_source_frames = {limits.max_source_frames} frames")
        if sum(durations) / 1000 > limits.max_duration:
            raise VideoError(
                f"the video lasts {sum(durations) / 1000:.0f} s, more than max_duration = {limits.max_duration:g} s"
            )
        try:
            self._image: Any = Image.open(io.BytesIO(data), formats=["WEBP"])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise VideoError(f"the WebP file is damaged: {' '.join(str(error).split())[:160]}") from error
        width, height = self._image.size
        if width * height > limits.max_pixels:
            raise VideoError(f"the video's frames are {width}x{height}, more than max_pixels = {limits.max_pixels}")
        count = min(len(durations), getattr(self._image, "n_frames", 1))
        ends = np.cumsum(np.array(durations[:count], dtype=np.int64))
        ticks = ends - durations[:count]
        warnings = [] if count == len(durations) else [CUT]
        none = np.zeros(0, dtype=np.int64)
        self.timeline = Timeline(
            ticks, ticks, ticks, ticks, none, none, Fraction(1, 1000), False, 0, int(ends[-1]), warnings
        )
        self.sample_aspect: Fraction | None = None
        self._deadline = deadline
        self.damaged = 0

    def walker(self, ticks: np.ndarray) -> WebPSource:
        """Itself: every picture is reached from the one before it."""
        return self

    def why_not_decord(self, first: Any) -> str:
        """As :func:`~score_vllm.video.with_decord.why_not`."""
        return "decord does not read WebP"

    def at(self, tick: int) -> tuple[Any, bool]:
        """As ``Walker.at``."""
        from PIL import Image

        self._deadline.check()
        try:
            self._image.seek(int(np.searchsorted(self.timeline.ticks, tick)))
            picture = self._image.convert("RGBA")
        except (OSError, EOFError, ValueError, Image.DecompressionBombError):
            self.damaged += 1
            return None, False
        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgba")
        frame.pts = tick
        return frame, True
