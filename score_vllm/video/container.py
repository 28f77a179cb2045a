"""Opening untrusted video files: what may be opened at all, what it may cost, and which stream is the video."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import av

# FFmpeg demuxers that a hostile file may reach. No playlists (hls, concat): they open other files.
CONTAINERS = (
    "mov",
    "mp4",
    "m4a",
    "3gp",
    "3g2",
    "mj2",
    "matroska",
    "webm",
    "avi",
    "mpegts",
    "mpeg",
    "flv",
    "ogg",
    "asf",
    "gif",
    "apng",
)
# What the refusals name; AVIF is read by the mov demuxer, animated WebP by Pillow.
CONTAINER_NAMES = (
    "MP4, MOV, 3GP, Matroska, WebM, AVI, MPEG-TS, MPEG-PS, FLV, Ogg, ASF/WMV, or an animated GIF, PNG, WebP or AVIF"
)
# Canonical codec names, as FFmpeg's `codec_id` has them: a decoder may call itself something else.
CODECS = (
    "h264",
    "hevc",
    "av1",
    "vp8",
    "vp9",
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "mjpeg",
    "msmpeg4v2",
    "msmpeg4v3",
    "wmv1",
    "wmv2",
    "h263",
    "flv1",
    "theora",
    "prores",
    "qtrle",
    "gif",
    "apng",
)
# Decoders of those codecs under other names.
DECODERS = (*CODECS, "libdav1d", "libvpx", "libvpx-vp9", "msmpeg4", "flv")


class VideoError(ValueError):
    """The file cannot be decoded, or exceeds a limit; the message says which in one sentence."""


class VideoDeadlineError(VideoError):
    """Decoding took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"decoding the video took longer than deadline = {seconds:g} s")


class VideoWindowError(VideoError):
    """``start`` or ``end`` does not fit the video; ``field`` is the one at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class DecoderBusyError(RuntimeError):
    """Too much is being decoded; ``retry_after`` seconds from now there may be room."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DecoderUnavailableError(RuntimeError):
    """Decoding failed for a reason that is not the file's: no file descriptors, memory or processes left."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one video may cost.

    Attributes:
        max_bytes: size of the encoded file.
        max_pixels: width * height of a frame in the file.
        max_source_frames: frames in the file, read or not.
        max_duration: seconds of video in the file.
        max_output_bytes: decoded RGB bytes of the frames read, at the size that they are delivered in.
        max_memory: memory of the decoding process beyond its start, where decoding has a process of its own.
        deadline: seconds that decoding may take, after which it is ended.
    """

    max_bytes: int = 1 << 30
    max_pixels: int = 7680 * 4320
    max_source_frames: int = 1_000_000
    max_duration: float = 6 * 3600.0
    max_output_bytes: int = 1 << 30
    max_memory: int = 3 << 30
    deadline: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")


class Deadline:
    """The moment by which decoding must be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise VideoDeadlineError(self.seconds)


class _TimedSource:
    """A file in memory, read without a copy of the whole; a demuxer that never comes to an end meets the deadline."""

    def __init__(self, data: bytes | memoryview, deadline: Deadline) -> None:
        self._view = memoryview(data)
        self._at = 0
        self._deadline = deadline

    def read(self, size: int = -1) -> bytes:
        self._deadline.check()
        end = len(self._view) if size < 0 else self._at + size
        part = bytes(self._view[self._at : end])
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at


def check_size(data: bytes | memoryview, limits: DecodeLimits) -> None:
    """Refuse empty and oversized files before anything parses them.

    Raises:
        VideoError: the file is empty or above ``max_bytes``.
    """
    if not len(data):
        raise VideoError("the video is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise VideoError(f"the video has {len(data)} bytes, more than max_bytes = {limits.max_bytes}")


def open_video(data: bytes | memoryview, limits: DecodeLimits, deadline: Deadline) -> Any:
    """The container, its streams probed.

    Raises:
        VideoError: no accepted container, or too damaged to be probed.
    """
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(DECODERS),
        "protocol_whitelist": "",
        # Probing decodes a frame or two already.
        "max_pixels": str(limits.max_pixels),
        # AVI and others store no presentation times; FFmpeg works them out from the decode times.
        "fflags": "+genpts",
    }
    try:
        return av.open(
            _TimedSource(data, deadline), mode="r", options=options, metadata_errors="replace", buffer_size=1 << 18
        )
    except av.FFmpegError as error:
        raise VideoError(
            f"the file is damaged, incomplete, or not a video in an accepted container ({CONTAINER_NAMES})"
        ) from error


def video_streams(container: Any) -> list[Any]:
    """Streams that may be the video, best first: default before others, then larger before smaller.

    Cover art (attached pictures) is never the video.

    Raises:
        VideoError: there is none, or none in an accepted codec.
    """
    attached = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & attached]
    if not streams:
        raise VideoError("the file has no video stream")
    accepted = [s for s in streams if s.codec_context is not None and _codec_name(s) in CODECS]
    if not accepted:
        raise VideoError(f"video codec {_codec_name(streams[0])!r} is not accepted; accepted are {', '.join(CODECS)}")

    def rank(stream: Any) -> tuple[bool, int, int]:
        default = bool(stream.disposition & av.stream.Disposition.default)
        area = stream.codec_context.width * stream.codec_context.height
        return not default, 0 if default else -area, stream.index

    return sorted(accepted, key=rank)


def _codec_name(stream: Any) -> str:
    context = stream.codec_context
    return "unknown" if context is None else context.codec.canonical_name


def prepare_stream(stream: Any, limits: DecodeLimits, threads: int) -> None:
    """Limits and threads of its decoder.

    Raises:
        VideoError: frames above ``max_pixels``, or of unknown size.
    """
    context = stream.codec_context
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
    context.thread_count = threads
