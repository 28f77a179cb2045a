"""Walking forward through a file's packets to the wanted pictures, jumping where a key frame lies ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np

from score_vllm.video.container import Deadline
from score_vllm.video.timeline import Timeline

# FFmpeg seeks in these by bytes: their clocks may jump.
_BYTE_SEEK = ("mpegts", "mpeg")
# Key frames tried before the one that should do, where nothing comes out of it.
_STEPS_BACK = 2


class Walker:
    """Decodes pictures of ascending presentation time.

    Args:
        container, stream: as :func:`~score_vllm.video.timeline.read_timeline` left them.
        timeline: of the stream.
        wanted: ticks of the pictures that will be asked for; others that no picture depends on are skipped.
        deadline: checked at every packet.
        reopen: opens the file anew and gives the container and the stream; called where seeking fails.

    Attributes:
        damaged: packets that the decoder refused.
        first: presentation time of the first picture decoded.
    """

    def __init__(
        self,
        container: Any,
        stream: Any,
        timeline: Timeline,
        wanted: np.ndarray,
        deadline: Deadline,
        reopen: Callable[[], tuple[Any, Any]],
    ) -> None:
        self._container, self._stream, self._timeline = container, stream, timeline
        self._wanted = set(wanted.tolist())
        self._deadline = deadline
        self._reopen = reopen
        self._key_ticks = np.maximum.accumulate(timeline.pts[timeline.keys])
        self._by_bytes = any(name in _BYTE_SEEK for name in container.format.name.split(","))
        self._by_position = False
        self._ordinals = self._lookup()
        self._sequential = False
        self._next: int | None = None  # ordinal of the packet that demuxing gives next; None: not known
        self._frames: Iterator[Any] = iter(())
        self._current: Any = None
        self._ahead: Any = None
        self.damaged = 0
        self.first: int | None = None

    def _lookup(self) -> dict[int, int] | None:
        """Ordinal by byte position, or by decode time where positions repeat; None where neither is unique."""
        for values in (self._timeline.raw_pos, self._timeline.raw_dts):
            if len(np.unique(values)) == len(values):
                self._by_position = values is self._timeline.raw_pos
                return {int(v): i for i, v in enumerate(values)}
        return None

    def at(self, tick: int) -> tuple[Any, bool]:
        """The picture of that presentation time; where it cannot be decoded, the one before it.

        Returns:
            ``(frame, exact)``; frame is None where nothing before it since the last key frame can be decoded either.
        """
        at = max(0, int(np.searchsorted(self._key_ticks, tick, side="right")) - 1)
        key = int(self._timeline.keys[at])
        if self._next is None or key > self._next:
            self._jump(key)
        for back in range(_STEPS_BACK + 1):
            frame = self._forward(tick)
            if frame is not None or back == _STEPS_BACK or at - back - 1 < 0 or self._sequential:
                break
            self._jump(int(self._timeline.keys[at - back - 1]))
        return frame, frame is not None and frame.pts == tick

    def _forward(self, tick: int) -> Any:
        while True:
            frame = self._ahead if self._ahead is not None else next(self._frames, None)
            self._ahead = None
            if frame is None:
                return self._current
            if frame.pts > tick:
                self._ahead = frame
                return self._current
            self._current = frame
            if frame.pts == tick:
                return frame

    def _jump(self, key: int) -> None:
        """Decode from packet ``key`` on; from the start of the file, once and for all, where seeking misses it."""
        self._current = self._ahead = None
        if not self._sequential and self._ordinals is not None and self._seek(key):
            return
        if self._sequential and self._next is not None:
            return  # already on the way there
        self._sequential = True
        self._container, self._stream = self._reopen()
        self._frames = self._decode(self._container.demux(self._stream), 0, int(self._timeline.keys[0]))

    def _seek(self, key: int) -> bool:
        timeline = self._timeline
        try:
            if self._by_bytes:
                if timeline.raw_pos[key] < 0:
                    return False
                self._container.seek(int(timeline.raw_pos[key]), stream=self._stream, unsupported_byte_offset=True)
            else:
                self._container.seek(int(timeline.raw_pts[key]), stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            first = next(packets)
        except (av.FFmpegError, StopIteration):
            return False
        assert self._ordinals is not None
        landed = self._ordinals.get(self._identity(first))
        if landed is None or landed > key:
            return False
        self._frames = self._decode(_with_first(first, packets), landed, key)
        return True

    def _identity(self, packet: Any) -> int:
        if self._by_position:
            return -1 if packet.pos is None else packet.pos
        stamp = packet.dts if packet.dts is not None else packet.pts
        return -1 if stamp is None else stamp

    def _decode(self, packets: Iterator[Any], ordinal: int, begin: int) -> Iterator[Any]:
        """Frames of the packets from ordinal ``begin`` on; damaged ones are passed over."""
        timeline, context = self._timeline, self._stream.codec_context
        self._next = ordinal
        while True:
            self._deadline.check()
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError):
                return
            if packet.size:
                if self._next < begin or self._next >= len(timeline.pts):
                    self._next += 1
                    continue
                tick = int(timeline.pts[self._next])
                if timeline.rewritten:
                    packet.pts = tick
                context.skip_frame = "DEFAULT" if tick in self._wanted else "NONREF"
                self._next += 1
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except av.FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                if frame.pts is not None:
                    self.first = frame.pts if self.first is None else self.first
                    yield frame


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
