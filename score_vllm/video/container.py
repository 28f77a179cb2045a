"""Opening untrusted video files: what may be opened at all, what it may cost, and where its frames are."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import av

# FFmpeg demuxers and decoders that a hostile file may reach. No playlists (hls, concat): they open other files.
CONTAINERS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg")
CODECS = (
    "h264",
    "hevc",
    "av1",
    "libdav1d",
    "vp8",
    "vp9",
    "libvpx",
    "libvpx-vp9",
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "mjpeg",
    "msmpeg4v3",
    "h263",
    "flv",
    "theora",
    "prores",
)


class VideoError(ValueError):
    """The file cannot be decoded, or exceeds a limit; the message says which."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one video may cost.

    Attributes:
        max_bytes: size of the encoded file.
        max_pixels: width * height of a frame.
        max_source_frames: frames in the file, read or not.
        max_duration: seconds of video in the file.
        max_output_bytes: decoded RGB bytes held at once.
        max_memory: memory of the decoding process beyond its start, where decoding has a process of its own.
        deadline: seconds that decoding may take, after which it is ended.
    """

    max_bytes: int = 1 << 30
    max_pixels: int = 7680 * 4320
    max_source_frames: int = 1_000_000
    max_duration: float = 6 * 3600.0
    max_output_bytes: int = 1 << 30
    max_memory: int = 3 << 30
    deadline: float = 120.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")


class Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise VideoError(f"decoding the video took longer than deadline = {self.seconds:g} s")


class TimedBytes(io.BytesIO):
    """FFmpeg reads through this object, so a demuxer that never comes to an end still meets the deadline."""

    def __init__(self, data: bytes, deadline: Deadline) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self._deadline.check()
        return super().read(size)


def check_size(data: bytes, limits: DecodeLimits) -> None:
    """Refuse empty and oversized files before anything parses them.

    Raises:
        VideoError: the file is empty or above ``max_bytes``.
    """
    if not data:
        raise VideoError("the video is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise VideoError(f"the video has {len(data)} bytes, more than max_bytes = {limits.max_bytes}")


def open_video(source: io.BytesIO, limits: DecodeLimits) -> Any:
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(CODECS),
        "protocol_whitelist": "",
        # Probing decodes a frame or two already.
        "max_pixels": str(limits.max_pixels),
    }
    try:
        return av.open(source, mode="r", options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(
            f"the file is damaged, incomplete, or not a video in an accepted container ({', '.join(CONTAINERS)})"
        ) from error


def video_stream(container: Any, limits: DecodeLimits) -> Any:
    attached = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & attached]
    if not streams:
        raise VideoError("the file has no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None or context.codec.name not in CODECS:
        name = "unknown" if context is None else context.codec.name
        raise VideoError(f"video codec {name!r} is not accepted; accepted are {', '.join(CODECS)}")
    if context.width < 1 or context.height < 1:
        # Probing leaves the size open where it is above the limit.
        raise VideoError(f"the video's frame size is not known, or above max_pixels = {limits.max_pixels}")
    if context.width * context.height > limits.max_pixels:
        raise VideoError(
            f"the video's frames are {context.width}x{context.height}, more than max_pixels = {limits.max_pixels}"
        )
    # The decoder enforces the limit too: a stream may announce one size and carry another.
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_type = "AUTO"
    # Every thread holds frames; a machine's full width would be memory for nothing.
    context.thread_count = 4
    return stream


class FrameIndex:
    """Presentation order of all frames, from one pass over the packets without decoding."""

    def __init__(self, container: Any, stream: Any, limits: DecodeLimits, deadline: Deadline) -> None:
        entries: list[tuple[int | None, bool]] = []
        try:
            for packet in container.demux(stream):
                deadline.check()
                if packet.size == 0:
                    continue
                entries.append((packet.pts, packet.is_keyframe))
                if len(entries) > limits.max_source_frames:
                    raise VideoError(f"the video has more than max_source_frames = {limits.max_source_frames} frames")
        except av.FFmpegError:
            # A truncated file: what was read so far is what there is.
            if not entries:
                raise
        if not entries:
            raise VideoError("the video has no frames (its length is zero)")
        stamps = [pts for pts, _ in entries if pts is not None]
        # Without one distinct time stamp per packet, frames can only be counted.
        self.seekable = len(stamps) == len(entries) == len(set(stamps))
        self.order: list[int] = sorted(stamps) if self.seekable else list(range(len(entries)))
        self.keyframes: list[int] = sorted(pts for pts, key in entries if key and pts is not None)
        base = float(stream.time_base or 0)
        span = (max(stamps) - min(stamps)) * base if stamps else 0.0
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not 0 < rate < 1000:
            rate = (len(entries) - 1) / span if span > 0 else 24.0
        self.fps = rate
        self.duration = max(span + 1.0 / rate, len(entries) / rate) if span else len(entries) / rate
        if self.duration > limits.max_duration:
            raise VideoError(
                f"the video lasts {self.duration:.0f} s, more than max_duration = {limits.max_duration:g} s"
            )
