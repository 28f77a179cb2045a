"""When each picture of a file is on screen: one pass over its packets, without decoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from score_vllm.video.container import Deadline, DecodeLimits, VideoError

# Formats whose clock may jump (FFmpeg: AVFMT_TS_DISCONT), and by how many seconds it then does.
_JUMPING = ("mpegts", "mpeg")
_JUMP = 10.0
# A decode time this much earlier than its predecessor begins another recording, key frame or not.
_STEP_BACK = 0.25
# Formats that store how long each picture lasts; elsewhere FFmpeg derives it from a header's frame rate.
_STORED_DURATIONS = ("mov", "gif", "apng")
_INTRA_ONLY = ("mjpeg", "prores", "qtrle")
CUT = "the file ends early or is damaged: what can be read of it was read"


class _Packets:
    """Packets of one stream in file order; None stamps are kept apart."""

    def __init__(self) -> None:
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.key: list[bool] = []
        self.discard: list[bool] = []
        self.pos: list[int] = []
        self.last_duration: int = 0
        self._latest: int | None = None

    def add(self, packet: Any) -> None:
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.key.append(packet.is_keyframe)
        self.discard.append(packet.is_discard)
        self.pos.append(packet.pos if packet.pos is not None else -1)
        if packet.pts is not None and (self._latest is None or packet.pts >= self._latest):
            self._latest, self.last_duration = packet.pts, packet.duration or 0

    @property
    def shown(self) -> int:
        return len(self.pts) - sum(self.discard)


@dataclass(eq=False)
class Timeline:
    """The presentable pictures of a stream.

    Attributes:
        ticks: [n] int64, presentation times in units of ``time_base``, strictly ascending.
        pts: [m] int64, presentation time of each packet in file order on that same clock.
        raw_pts, raw_dts, raw_pos: [m] int64, presentation and decode time (each the other one where it is missing) and
            byte position as the file has them.
        keys: ordinals of the packets that decoding can begin at, ascending.
        time_base: seconds per tick.
        rewritten: packets need their ``pts`` replaced before they are decoded.
        hidden: packets that an edit list hides.
        end: tick at which the last picture ends.
        warnings: what had to be repaired.
    """

    ticks: np.ndarray
    pts: np.ndarray
    raw_pts: np.ndarray
    raw_dts: np.ndarray
    raw_pos: np.ndarray
    keys: np.ndarray
    time_base: Fraction
    rewritten: bool
    hidden: int
    end: int
    warnings: list[str]

    @property
    def stamps(self) -> np.ndarray:
        """[n] float64 seconds, the first 0."""
        return (self.ticks - self.ticks[0]) * float(self.time_base)

    @property
    def duration(self) -> float:
        """Seconds from the first picture's beginning to the last one's end."""
        return (self.end - int(self.ticks[0])) * float(self.time_base)


def read_timeline(container: Any, streams: list[Any], limits: DecodeLimits, deadline: Deadline) -> tuple[Any, Timeline]:
    """The stream that is the video, out of the candidates best first, and its timeline.

    A stream of one picture yields to one of several.

    Raises:
        VideoError: no picture, or a limit.
    """
    for stream in container.streams:
        stream.discard = av.stream.Discard.default if stream in streams else av.stream.Discard.all
    found = {stream.index: _Packets() for stream in streams}
    damaged = _demux(container, streams, found, limits, deadline)
    stream = next((s for s in streams if found[s.index].shown > 1), streams[0])
    if not found[stream.index].shown:
        stream = next((s for s in streams if found[s.index].shown), stream)
    for other in streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    timeline = _build(container, stream, found[stream.index])
    if damaged:
        timeline.warnings.append(CUT)
    if timeline.duration > limits.max_duration:
        raise VideoError(
            f"the video lasts {timeline.duration:.0f} s, more than max_duration = {limits.max_duration:g} s"
        )
    return stream, timeline


def _demux(
    container: Any, streams: list[Any], found: dict[int, _Packets], limits: DecodeLimits, deadline: Deadline
) -> bool:
    """Fill ``found``; True where the file broke off."""
    count = 0
    try:
        for packet in container.demux(streams):
            if not packet.size:
                continue
            count += 1
            if not count % 256:
                deadline.check()
            if count > limits.max_source_frames:
                raise VideoError(f"the video has more than max_source_frames = {limits.max_source_frames} frames")
            found[packet.stream_index].add(packet)
    except av.FFmpegError:
        # A truncated file: what was read so far is what there is.
        if not count:
            raise
        return True
    if not count:
        raise VideoError("the video has no frames (its length is zero)")
    return False


def _build(container: Any, stream: Any, packets: _Packets) -> Timeline:
    base = Fraction(stream.time_base)
    warnings: list[str] = []
    dts = _filled(packets.dts, packets.pts)
    pts = _filled(packets.pts, packets.dts)
    count = len(packets.pts)
    if dts is None or pts is None or len(np.unique(pts[~np.asarray(packets.discard)])) < packets.shown / 2:
        step = max(1, round(1 / (_rate(stream) * base)))
        dts = pts = np.arange(count, dtype=np.int64) * step
        warnings.append("the pictures have no time stamps: they are taken to follow at the header's frame rate")
    raw_pts = _either(packets.pts, packets.dts)
    rewritten = any(v is None for v in packets.pts)
    key = np.asarray(packets.key, dtype=bool)
    show = ~np.asarray(packets.discard, dtype=bool)
    codec = stream.codec_context.codec.canonical_name
    joins = _joins(packets.dts, key, base, container.format.name)
    segments = np.split(np.arange(count), joins)
    if not key.any() or codec in _INTRA_ONLY:
        key[:] = key if key.any() else True
    else:
        for number, segment in enumerate(segments):
            begins = segment[key[segment]]
            if not len(begins):
                show[segment] = False
                continue
            show[segment[segment < begins[0]]] = False
            if number:  # pictures that need the recording before this one's key frame
                show[segment[pts[segment] < pts[begins[0]]]] = False
        if not show.any():
            show = ~np.asarray(packets.discard, dtype=bool)
    if joins.size:
        pts = _chain(pts, show, segments)
        warnings.append(f"time stamps jump {len(joins)} time(s): the parts were put one after the other in file order")
    ticks = np.unique(pts[show])
    if not len(ticks):
        raise VideoError("the video has no picture that is shown: an edit list hides all of them")
    hidden = count - int(show.sum()) - sum(packets.discard)
    if hidden > 0:
        warnings.append(f"{hidden} picture(s) before a key frame cannot be decoded and were left out")
    stored = any(name in _STORED_DURATIONS for name in container.format.name.split(","))
    last = packets.last_duration if stored else 0
    if last <= 0:
        last = int(np.median(np.diff(ticks))) if len(ticks) > 1 else packets.last_duration
    if last <= 0:
        last = max(1, round(1 / (_rate(stream) * base)))
    pos = np.asarray(packets.pos, dtype=np.int64)
    return Timeline(
        ticks,
        pts,
        raw_pts,
        _either(packets.dts, packets.pts),
        pos,
        np.flatnonzero(key),
        base,
        rewritten or bool((pts != raw_pts).any()),
        sum(packets.discard),
        int(ticks[-1]) + last,
        warnings,
    )


def _rate(stream: Any) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 0 < rate < 1000:
            return Fraction(rate)
    return Fraction(24)


def _either(first: list[int | None], second: list[int | None]) -> np.ndarray:
    pairs = zip(first, second, strict=True)
    return np.array([a if a is not None else b if b is not None else 0 for a, b in pairs], dtype=np.int64)


def _filled(first: Iterable[int | None], second: Iterable[int | None]) -> np.ndarray | None:
    """First choice of each stamp, or the second; None where both lack more than a few."""
    values = [a if a is not None else b for a, b in zip(first, second, strict=True)]
    missing = [i for i, v in enumerate(values) if v is None]
    if len(missing) > len(values) // 10:
        return None
    if missing:
        known = [i for i, v in enumerate(values) if v is not None]
        return np.rint(np.interp(np.arange(len(values)), known, [float(values[i]) for i in known])).astype(np.int64)  # type: ignore[arg-type]
    return np.array(values, dtype=np.int64)


def _joins(stamps: list[int | None], key: np.ndarray, base: Fraction, format_name: str) -> np.ndarray:
    """Ordinals of packets with which another recording begins, by their decode times."""
    known = np.array([i for i, dts in enumerate(stamps) if dts is not None], dtype=np.int64)
    steps = np.diff(np.array([dts for dts in stamps if dts is not None], dtype=np.int64))
    begins = (steps < 0) & (key[known[1:]] | (steps < -int(_STEP_BACK / base)))
    if any(name in _JUMPING for name in format_name.split(",")):
        begins |= steps > int(_JUMP / base)
    return known[1:][begins]


def _chain(pts: np.ndarray, show: np.ndarray, segments: list[np.ndarray]) -> np.ndarray:
    """Stamps of the segments moved so that each begins where the one before it ends."""
    moved = pts.copy()
    end: int | None = None
    for segment in segments:
        shown = segment[show[segment]]
        if not len(shown):
            if end is not None:
                moved[segment] = end
            continue
        ticks = np.unique(pts[shown])
        step = int(np.median(np.diff(ticks))) if len(ticks) > 1 else 1
        if end is not None:
            moved[segment] = pts[segment] + (end - int(ticks[0]))
        end = int(moved[shown].max()) + step
    return moved
