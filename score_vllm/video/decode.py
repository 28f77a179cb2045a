"""Safe decoding of untrusted video files with PyAV: the pictures on screen at the times that sampling chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import av
import numpy as np

from score_vllm.video import with_decord
from score_vllm.video.container import (
    Deadline,
    DecodeLimits,
    VideoError,
    check_size,
    open_video,
    prepare_stream,
    video_streams,
)
from score_vllm.video.damage import listen
from score_vllm.video.picture import Painter, Resize
from score_vllm.video.result import DecodedVideo
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, MIN_FRAMES, TEMPORAL_MERGE, choose
from score_vllm.video.timeline import CUT, read_timeline
from score_vllm.video.walk import Walker
from score_vllm.video.webp import WebPSource, is_webp

BACKENDS = ("pyav", "decord")
Allocate = Callable[[int], Any]


def decode_video(
    data: bytes | memoryview,
    *,
    fps: float | None = DEFAULT_FPS,
    max_frames: int = DEFAULT_MAX_FRAMES,
    start: float | None = None,
    end: float | None = None,
    thinning: str = "even",
    temporal_merge: int = TEMPORAL_MERGE,
    min_frames: int = MIN_FRAMES,
    resize: Resize | None = None,
    limits: DecodeLimits | None = None,
    backend: str = "pyav",
    threads: int = 1,
    allocate: Allocate = bytearray,
) -> DecodedVideo:
    """Decode the pictures that :func:`~score_vllm.video.sampling.choose` asks for.

    The file is opened once: a pass over its packets gives the pictures' times, then the wanted ones are reached
    through key frames, one after the other. Damaged packets are passed over: the picture before them stays on
    screen, and a warning says so.

    Args:
        data: the file's bytes.
        fps, max_frames, start, end, thinning, temporal_merge, min_frames: see ``choose``.
        resize: deliver the size that the model's processor will choose; None: the source's own.
        limits: what the file may cost.
        backend: ``pyav``, or ``decord`` for what decord reads rightly (a warning says where it does not).
        threads: of the decoder; more than one only in a process that does nothing else, for its standard error is
            read back meanwhile.
        allocate: gives a writable buffer of so many bytes for the frames.

    Returns:
        The frames with their times.

    Raises:
        VideoError: not a video, no decodable frame, a container or codec outside the allow-lists, or a limit.
        VideoWindowError: the window does not fit the video.
        ValueError: another argument is out of range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    limits = limits or DecodeLimits()
    check_size(data, limits)
    deadline = Deadline(limits.deadline)
    try:
        with listen(threads) as complaints, ExitStack() as stack:
            source = (
                WebPSource(data, limits, deadline) if is_webp(data) else _Source(data, limits, deadline, threads, stack)
            )
            timeline = source.timeline
            sample = choose(
                timeline.stamps,
                timeline.duration,
                fps=fps,
                max_frames=max_frames,
                start=start,
                end=end,
                thinning=thinning,
                temporal_merge=temporal_merge,
                min_frames=min_frames,
            )
            ticks = timeline.ticks[sample.indices]
            walker = source.walker(ticks)
            painter = Painter(len(ticks), resize, source.sample_aspect, limits)
            complaints.decoding_begins()
            row, first, missing = _first(walker, ticks)
            shape = (len(ticks), *painter.start(first), 3)
            frames = np.frombuffer(allocate(math.prod(shape)), np.uint8).reshape(shape)
            refused = ""
            if backend == "decord":
                refused = source.why_not_decord(first) or with_decord.read(
                    data, timeline, sample.indices, painter, frames, threads
                )
            if backend != "decord" or refused:
                missing += _paint(walker, painter, ticks, frames, row)
            complained, cut = complaints.of_decoder(), complaints.is_cut()
    except MemoryError as error:
        raise VideoError("decoding the video needs more memory than there is") from error
    except av.FFmpegError as error:
        raise VideoError(f"the video cannot be decoded: {error.strerror}") from error
    warnings = list(timeline.warnings)
    if refused:
        warnings.append(f"read with PyAV instead of decord: {refused}")
    if cut and CUT not in warnings:
        warnings.append(CUT)
    damaged = bool(walker.damaged or missing or complained)
    if damaged:
        warnings.append(
            f"the file is damaged: {walker.damaged} packet(s) could not be decoded, {missing} frame(s) show the "
            f"picture beside the one that is lost, and the decoder complained {complained} time(s)"
        )
    if painter.fitted:
        warnings.append(f"the picture's size changes: {painter.fitted} frame(s) were fitted to the first one's size")
    if painter.interlaced:
        warnings.append("the video is interlaced: both fields of a frame are shown woven")
    if end is not None and end > timeline.duration:
        warnings.append(f"end = {end:g} s is beyond the video, which lasts {timeline.duration:.3f} s")
    height, width = painter.display
    return DecodedVideo(
        frames=frames,
        times=sample.times,
        step=sample.step,
        window=sample.window,
        duration=timeline.duration,
        total_frames=len(timeline.ticks),
        source_fps=len(timeline.ticks) / timeline.duration,
        source_size=(width, height),
        warnings=tuple(warnings),
        damaged=damaged,
    )


class _Source:
    """An opened file with its timeline."""

    def __init__(
        self, data: bytes | memoryview, limits: DecodeLimits, deadline: Deadline, threads: int, stack: ExitStack
    ) -> None:
        self._data, self._limits, self._deadline = data, limits, deadline
        self._threads, self._stack = threads, stack
        self._container = stack.enter_context(open_video(data, limits, deadline))
        streams = video_streams(self._container)
        for stream in streams:
            prepare_stream(stream, limits, threads)
        self._stream, self.timeline = read_timeline(self._container, streams, limits, deadline)
        self.sample_aspect = self._stream.sample_aspect_ratio
        self._settle_start()

    def walker(self, ticks: np.ndarray) -> Walker:
        return Walker(self._container, self._stream, self.timeline, ticks, self._deadline, self._reopen)

    def why_not_decord(self, first: Any) -> str:
        return with_decord.why_not(self._container, self._stream, self.timeline, first)

    def _reopen(self) -> tuple[Any, Any]:
        container = self._stack.enter_context(open_video(self._data, self._limits, self._deadline))
        for other in container.streams:
            if other.index != self._stream.index:
                other.discard = av.stream.Discard.all
        stream = container.streams[self._stream.index]
        prepare_stream(stream, self._limits, self._threads)
        return container, stream

    def _settle_start(self) -> None:
        """Pictures shown before the first key frame may need one that is not there; only decoding tells."""
        timeline = self.timeline
        tick = int(timeline.pts[timeline.keys[0]])
        if timeline.ticks[0] >= tick:
            return
        walker = self.walker(timeline.ticks)
        walker.at(tick)
        if walker.first is not None and walker.first > timeline.ticks[0]:
            lost = int((timeline.ticks < walker.first).sum())
            timeline.ticks = timeline.ticks[lost:]
            timeline.warnings.append(
                f"{lost} picture(s) before the first key frame cannot be decoded and were left out"
            )


def _first(walker: Walker | WebPSource, ticks: np.ndarray) -> tuple[int, Any, int]:
    """The first of the wanted pictures that can be decoded.

    Returns:
        ``(row, frame, missing)``: missing of the rows before it show it too.

    Raises:
        VideoError: there is none.
    """
    for row, tick in enumerate(ticks.tolist()):
        if row and tick == ticks[row - 1]:
            continue
        frame, exact = walker.at(tick)
        if frame is not None:
            return row, frame, row + (not exact)
    raise VideoError("no frame of the video could be decoded")


def _paint(walker: Walker | WebPSource, painter: Painter, ticks: np.ndarray, frames: np.ndarray, first: int) -> int:
    """Fill ``frames``; rows before ``first`` show its picture.

    Returns:
        How many rows after it show the picture before theirs, which is damaged.
    """
    missing = 0
    for row in range(first, len(ticks)):
        repeated = row > first and ticks[row] == ticks[row - 1]
        frame, exact = (None, True) if repeated else walker.at(int(ticks[row]))
        missing += not exact and row > first
        if frame is None:
            frames[row] = frames[row - 1]
        else:
            painter.paint(frame, frames[row])
    frames[:first] = frames[first]
    return missing
