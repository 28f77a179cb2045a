"""Writing clips whose pictures carry their number in twelve bit squares."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 192, 128
BITS = 12
TICK = Fraction(1, 1000)


@dataclass
class Truth:
    """``stamps[i]`` seconds is when picture ``numbers[i]`` appears; the last one is shown until ``duration``."""

    stamps: list[float]
    numbers: list[int]
    duration: float
    size: tuple[int, int] = (WIDTH, HEIGHT)
    turn: tuple[int, int, int, int] = (1, 0, 0, 1)
    warning: str = ""
    tolerance: float = 0.0011

    def shown(self, time: float) -> set[int]:
        """Numbers on screen at that moment; two where stamps are rounded to the container's ticks."""
        return {
            self.numbers[max(0, int(np.searchsorted(self.stamps, time + slack, side="right")) - 1)]
            for slack in (-self.tolerance, 0.0, self.tolerance)
        }


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[height, width, 3] uint8: the number's bits, highest first, along the top eighth; grey below."""
    picture = np.full((height, width, 3), 90 + number % 60, np.uint8)
    edges = [round(i * width / BITS) for i in range(BITS + 1)]
    for bit in range(BITS):
        picture[: max(1, height // 8), edges[bit] : edges[bit + 1]] = 255 * (number >> (BITS - 1 - bit) & 1)
    return picture


def number_of(picture: np.ndarray) -> int:
    """What :func:`numbered` wrote, from the middles of the squares."""
    height, width = picture.shape[:2]
    line = picture[: max(1, height // 16 + 1)].mean((0, 2))
    number = 0
    for bit in range(BITS):
        low, high = (bit + 0.3) * width / BITS, (bit + 0.7) * width / BITS
        number = number << 1 | int(line[int(low) : max(int(low) + 1, int(high))].mean() > 127)
    return number


def even(count: int, fps: float) -> list[float]:
    return [i / fps for i in range(count)]


VARIABLE = [*even(15, 10), *(1.5 + i for i in range(4)), *(5.5 + i / 30 for i in range(30))]


@dataclass
class Recipe:
    """How a clip is written. ``stamps`` are seconds of all pictures written, ``numbers`` begin at ``first``."""

    container: str
    codec: str
    stamps: Sequence[float]
    first: int = 0
    last_duration: float | None = None
    size: tuple[int, int] = (WIDTH, HEIGHT)
    codec_options: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    gop: int = 12
    b_frames: int = 0
    pix_fmt: str = "yuv420p"
    rate: int = 10
    shift: float = 0.0
    matrix: tuple[int, ...] | None = None
    keep: Callable[[int, Any], bool] | None = None
    sizes: Callable[[int], tuple[int, int]] | None = None
    extra: str = ""


def write(recipe: Recipe) -> bytes:
    """The clip's bytes."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=recipe.container, options=recipe.options) as out:
        if recipe.extra == "first_stream":
            other = stream_of(out, recipe, recipe.codec)
        stream = stream_of(out, recipe, recipe.codec)
        if recipe.extra == "first_stream":
            other.disposition = av.stream.Disposition(0)
            stream.disposition = av.stream.Disposition.default
        if recipe.extra == "cover":
            cover = out.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
        if recipe.matrix is not None:
            stream.set_display_matrix(recipe.matrix)
        packets = []
        for number, packet in enumerate(encode(stream, recipe)):
            if recipe.keep is None or recipe.keep(number, packet):
                packets.append(packet)
        if recipe.extra == "first_stream":
            for packet in other.encode(_frame(4095, recipe, 0)) + other.encode(None):
                packet.pts = packet.dts = 0
                packet.time_base = TICK
                out.mux(packet)
        if recipe.extra == "cover":
            frame = av.VideoFrame.from_ndarray(np.full((240, 320, 3), 200, np.uint8), format="rgb24")
            for packet in cover.encode(frame) + cover.encode(None):
                packet.pts = packet.dts = 0
                out.mux(packet)
        for packet in packets:
            out.mux(packet)
    return sink.getvalue()


def stream_of(out: Any, recipe: Recipe, codec: str) -> Any:
    stream = out.add_stream(codec, rate=recipe.rate, options=recipe.codec_options)
    stream.width, stream.height = recipe.size
    stream.pix_fmt = recipe.pix_fmt
    stream.time_base = stream.codec_context.time_base = TICK if recipe.codec != "gif" else Fraction(1, 100)
    if codec in ("mpeg2video", "mpeg1video", "mpeg4", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "h263", "flv", "mjpeg"):
        stream.codec_context.time_base = Fraction(1, recipe.rate)
    stream.codec_context.gop_size = recipe.gop
    stream.codec_context.max_b_frames = recipe.b_frames
    stream.codec_context.bit_rate = 4_000_000
    return stream


def _frame(number: int, recipe: Recipe, at: int) -> Any:
    width, height = recipe.sizes(at) if recipe.sizes else recipe.size
    return av.VideoFrame.from_ndarray(numbered(number, width, height), format="rgb24")


def encode(stream: Any, recipe: Recipe) -> Iterable[Any]:
    base = stream.codec_context.time_base
    for at, stamp in enumerate(recipe.stamps):
        frame = _frame(recipe.first + at, recipe, at)
        frame.time_base = base
        frame.pts = round(Fraction(stamp).limit_denominator(100000) / base)
        yield from _shifted(stream.encode(frame), recipe.shift)
    yield from _shifted(stream.encode(None), recipe.shift)


def _shifted(packets: list[Any], seconds: float) -> Iterable[Any]:
    for packet in packets:
        if seconds:
            ticks = round(seconds / packet.time_base)
            packet.pts += ticks
            packet.dts += ticks
        yield packet


H264 = {"preset": "ultrafast", "crf": "20"}
CODEC = {
    "mp4": "libx264",
    "mov": "libx264",
    "matroska": "libx264",
    "webm": "libvpx",
    "mpegts": "libx264",
    "avi": "mpeg4",
    "gif": "gif",
}


def recipe(container: str, stamps: Sequence[float], **changes: Any) -> Recipe:
    """The usual codec of a container."""
    made = {"codec": CODEC[container], "codec_options": {}}
    if CODEC[container] == "libx264":
        made["codec_options"] = dict(H264)
    if CODEC[container] == "libvpx":
        made["codec_options"] = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "lag-in-frames": "0"}
    if container == "gif":
        made["pix_fmt"] = "rgb8"
    made["codec_options"].update(changes.pop("codec_options", {}))
    return Recipe(container, stamps=stamps, **{**made, **changes})


def truth_of(made: Recipe, **changes: Any) -> Truth:
    """What a player shows of an ordinary clip: every picture, from 0 on."""
    stamps = [s - made.stamps[0] for s in made.stamps]
    last = made.last_duration if made.last_duration is not None else float(np.median(np.diff(stamps or [0, 1])))
    fields = {
        "stamps": stamps,
        "numbers": [made.first + i for i in range(len(stamps))],
        "duration": stamps[-1] + last,
        "size": made.size,
    }
    return Truth(**{**fields, **changes})
