"""Safe decoding of untrusted video files with PyAV: limits before and while decoding, and nothing read ahead."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from score_vllm.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, sample_frame_indices

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
        deadline: seconds that decoding may take, after which it is ended.
    """

    max_bytes: int = 1 << 30
    max_pixels: int = 7680 * 4320
    max_source_frames: int = 1_000_000
    max_duration: float = 6 * 3600.0
    max_output_bytes: int = 4 << 30
    deadline: float = 120.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value!r}")


@dataclass(frozen=True, slots=True, eq=False)
class DecodedVideo:
    """Sampled frames of a video.

    Attributes:
        frames: [F, H, W, 3] uint8 RGB, upright.
        indices: F indices of those frames in the file, ascending.
        total_frames: frames in the file.
        fps: frames per second of the file.
        duration: seconds.
    """

    frames: np.ndarray
    indices: list[int]
    total_frames: int
    fps: float
    duration: float


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise VideoError(f"decoding the video took longer than deadline = {self.seconds:g} s")


class _TimedBytes(io.BytesIO):
    """FFmpeg reads through this object, so a demuxer that never comes to an end still meets the deadline."""

    def __init__(self, data: bytes, deadline: _Deadline) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self._deadline.check()
        return super().read(size)


def decode_video(
    data: bytes,
    *,
    fps: float = DEFAULT_FPS,
    max_frames: int = DEFAULT_MAX_FRAMES,
    limits: DecodeLimits | None = None,
) -> DecodedVideo:
    """Decode the frames that :func:`~score_vllm.sampling.sample_frame_indices` asks for.

    Frames are reached through key frames, one after the other: only the sampled ones are ever held. Damaged
    packets are skipped; the frames that still decode are returned with their true indices.

    Args:
        data: the file's bytes.
        fps: frames per second to read.
        max_frames: most frames to read.
        limits: what the file may cost.

    Returns:
        The frames and where they stood.

    Raises:
        VideoError: not a video, no decodable frame, a container or codec outside the allow-lists, or a limit.
    """
    limits = limits or DecodeLimits()
    check_size(data, limits)
    deadline = _Deadline(limits.deadline)
    try:
        index = _index(data, limits, deadline)
        wanted = sample_frame_indices(len(index.order), index.fps, fps, max_frames)
        frames, valid = _read_frames(data, index, wanted, limits, deadline)
    except av.FFmpegError as error:
        raise VideoError(f"the file is not a video that can be decoded: {error}") from error
    return DecodedVideo(frames, valid, len(index.order), index.fps, index.duration)


def check_size(data: bytes, limits: DecodeLimits) -> None:
    """Refuse empty and oversized files before anything parses them.

    Raises:
        VideoError: the file is empty or above ``max_bytes``.
    """
    if not data:
        raise VideoError("the video is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise VideoError(f"the video has {len(data)} bytes, more than max_bytes = {limits.max_bytes}")


def probe_video(data: bytes, limits: DecodeLimits) -> None:
    """Apply every check that precedes decoding, for loaders that decode elsewhere.

    Raises:
        VideoError: as :func:`decode_video`.
    """
    check_size(data, limits)
    try:
        _index(data, limits, _Deadline(limits.deadline))
    except av.FFmpegError as error:
        raise VideoError(f"the file is not a video that can be decoded: {error}") from error


def _index(data: bytes, limits: DecodeLimits, deadline: _Deadline) -> _FrameIndex:
    with _open(_TimedBytes(data, deadline)) as container:
        return _FrameIndex(container, _video_stream(container, limits), limits, deadline)


def _open(source: io.BytesIO) -> Any:
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(CODECS),
        "protocol_whitelist": "",
    }
    try:
        return av.open(source, mode="r", options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(
            f"the file is not a video in an accepted container ({', '.join(CONTAINERS)}): {error}"
        ) from error


def _video_stream(container: Any, limits: DecodeLimits) -> Any:
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
        raise VideoError(f"the video's frame size is {context.width}x{context.height}")
    if context.width * context.height > limits.max_pixels:
        raise VideoError(
            f"the video's frames are {context.width}x{context.height}, more than max_pixels = {limits.max_pixels}"
        )
    # The decoder enforces the limit too: a stream may announce one size and carry another.
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_type = "AUTO"
    return stream


class _FrameIndex:
    """Presentation order of all frames, from one pass over the packets without decoding."""

    def __init__(self, container: Any, stream: Any, limits: DecodeLimits, deadline: _Deadline) -> None:
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


def _decode(container: Any, stream: Any, deadline: _Deadline) -> Iterator[Any]:
    """Frames from the current place on; damaged packets are passed over."""
    packets = container.demux(stream)
    while True:
        deadline.check()
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        try:
            yield from packet.decode()
        except av.error.EOFError:
            return
        except av.FFmpegError:
            continue


class _Collector:
    """Room for the sampled frames, made when the first one shows its size."""

    def __init__(self, wanted: int, limits: DecodeLimits) -> None:
        self._wanted = wanted
        self._limits = limits
        self.frames: np.ndarray | None = None
        self.indices: list[int] = []

    def add(self, index: int, frame: Any) -> None:
        picture = _upright_rgb(frame, self._limits)
        if self.frames is None:
            if picture.nbytes * self._wanted > self._limits.max_output_bytes:
                raise VideoError(
                    f"{self._wanted} frames of {picture.shape[1]}x{picture.shape[0]} pixels are more than "
                    f"max_output_bytes = {self._limits.max_output_bytes}; ask for fewer frames"
                )
            self.frames = np.empty((self._wanted, *picture.shape), dtype=np.uint8)
        if picture.shape == self.frames.shape[1:]:
            self.frames[len(self.indices)] = picture
            self.indices.append(index)

    def clear(self) -> None:
        self.indices.clear()


def _read_frames(
    data: bytes, index: _FrameIndex, wanted: list[int], limits: DecodeLimits, deadline: _Deadline
) -> tuple[np.ndarray, list[int]]:
    out = _Collector(len(wanted), limits)
    if not (index.seekable and _read_by_seeking(data, index, wanted, out, limits, deadline)):
        out.clear()
        _read_in_order(data, index, wanted, out, limits, deadline)
    if out.frames is None or not out.indices:
        raise VideoError("no frame of the video could be decoded")
    return out.frames[: len(out.indices)], out.indices


def _read_in_order(
    data: bytes, index: _FrameIndex, wanted: list[int], out: _Collector, limits: DecodeLimits, deadline: _Deadline
) -> None:
    """Decode from the start; frames are known by their time stamp, or counted where stamps cannot be trusted."""
    targets = {index.order[i]: i for i in wanted}
    with _open(_TimedBytes(data, deadline)) as container:
        stream = _video_stream(container, limits)
        for count, frame in enumerate(_decode(container, stream, deadline)):
            position = targets.get(frame.pts if index.seekable else count)
            if position is not None:
                out.add(position, frame)
                if len(out.indices) == len(wanted):
                    return


def _read_by_seeking(
    data: bytes, index: _FrameIndex, wanted: list[int], out: _Collector, limits: DecodeLimits, deadline: _Deadline
) -> bool:
    """Walk the targets in order and jump where a key frame lies ahead; False where a jump landed too late.

    Containers differ in what they seek by (decode time, byte position), so every landing is checked.
    """
    keyframes = np.asarray(index.keyframes, dtype=np.int64)
    with _open(_TimedBytes(data, deadline)) as container:
        stream = _video_stream(container, limits)
        frames = _decode(container, stream, deadline)
        here: int | None = None
        for position in wanted:
            target = index.order[position]
            at = int(np.searchsorted(keyframes, target, side="right")) - 1
            if at > 0 and (here is None or keyframes[at] > here):
                try:
                    container.seek(int(keyframes[at]), stream=stream, backward=True)
                except av.FFmpegError:
                    return False
                frames = _decode(container, stream, deadline)
            frame = next((f for f in frames if f.pts is not None and f.pts >= target), None)
            if frame is None or frame.pts != target:
                return False
            here = target
            out.add(position, frame)
    return True


def _upright_rgb(frame: Any, limits: DecodeLimits) -> np.ndarray:
    if frame.width * frame.height > limits.max_pixels:
        raise VideoError(
            f"a frame of the video is {frame.width}x{frame.height}, more than max_pixels = {limits.max_pixels}"
        )
    picture = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
