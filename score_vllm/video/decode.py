"""Safe decoding of untrusted video files with PyAV: limits before and while decoding, and nothing read ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from score_vllm.video.container import (
    Deadline,
    DecodeLimits,
    FrameIndex,
    TimedBytes,
    VideoError,
    check_size,
    open_video,
    video_stream,
)
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, sample_frame_indices

__all__ = ["DecodeLimits", "DecodedVideo", "VideoError", "decode_video", "probe_video"]


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

    def metadata(self, loader: str = "score_pyav") -> dict[str, Any]:
        """The metadata that vLLM's video inputs and transformers' processors expect beside the frames."""
        return {
            "total_num_frames": self.total_frames,
            "fps": self.fps,
            "duration": self.duration,
            "video_backend": loader,
            "frames_indices": self.indices,
            # The frames are chosen; the model's processor must not choose again.
            "do_sample_frames": False,
        }


def decode_video(
    data: bytes,
    *,
    fps: float = DEFAULT_FPS,
    max_frames: int = DEFAULT_MAX_FRAMES,
    limits: DecodeLimits | None = None,
) -> DecodedVideo:
    """Decode the frames that :func:`~score_vllm.video.sampling.sample_frame_indices` asks for.

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
    deadline = Deadline(limits.deadline)
    try:
        index = _index(data, limits, deadline)
        wanted = sample_frame_indices(len(index.order), index.fps, fps, max_frames)
        frames, valid = _read_frames(data, index, wanted, limits, deadline)
    except av.FFmpegError as error:
        raise VideoError(f"the video cannot be decoded: {error.strerror}") from error
    return DecodedVideo(frames, valid, len(index.order), index.fps, index.duration)


def probe_video(data: bytes, limits: DecodeLimits) -> None:
    """Apply every check that precedes decoding, for loaders that decode elsewhere.

    Raises:
        VideoError: as :func:`decode_video`.
    """
    check_size(data, limits)
    try:
        _index(data, limits, Deadline(limits.deadline))
    except av.FFmpegError as error:
        raise VideoError(f"the video cannot be decoded: {error.strerror}") from error


def _index(data: bytes, limits: DecodeLimits, deadline: Deadline) -> FrameIndex:
    with open_video(TimedBytes(data, deadline), limits) as container:
        return FrameIndex(container, video_stream(container, limits), limits, deadline)


def _decode(container: Any, stream: Any, deadline: Deadline) -> Iterator[Any]:
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
    data: bytes, index: FrameIndex, wanted: list[int], limits: DecodeLimits, deadline: Deadline
) -> tuple[np.ndarray, list[int]]:
    out = _Collector(len(wanted), limits)
    if not (index.seekable and _read_by_seeking(data, index, wanted, out, limits, deadline)):
        out.clear()
        _read_in_order(data, index, wanted, out, limits, deadline)
    if out.frames is None or not out.indices:
        raise VideoError("no frame of the video could be decoded")
    return out.frames[: len(out.indices)], out.indices


def _read_in_order(
    data: bytes, index: FrameIndex, wanted: list[int], out: _Collector, limits: DecodeLimits, deadline: Deadline
) -> None:
    """Decode from the start; frames are known by their time stamp, or counted where stamps cannot be trusted."""
    targets = {index.order[i]: i for i in wanted}
    with open_video(TimedBytes(data, deadline), limits) as container:
        stream = video_stream(container, limits)
        for count, frame in enumerate(_decode(container, stream, deadline)):
            position = targets.get(frame.pts if index.seekable else count)
            if position is not None:
                out.add(position, frame)
                if len(out.indices) == len(wanted):
                    return


def _read_by_seeking(
    data: bytes, index: FrameIndex, wanted: list[int], out: _Collector, limits: DecodeLimits, deadline: Deadline
) -> bool:
    """Walk the targets in order and jump where a key frame lies ahead; False where a jump landed too late.

    Containers differ in what they seek by (decode time, byte position), so every landing is checked.
    """
    keyframes = np.asarray(index.keyframes, dtype=np.int64)
    with open_video(TimedBytes(data, deadline), limits) as container:
        stream = video_stream(container, limits)
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
