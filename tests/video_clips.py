"""Generated clips of every kind that goes wrong somewhere, and what is right about them.

``CASES`` names them; :func:`make` gives the bytes and the truth: when each picture is on screen, counted from the
first one that a player shows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import av
import numpy as np

from tests.video_writing import (
    CODEC,
    VARIABLE,
    Recipe,
    Truth,
    encode,
    even,
    number_of,
    recipe,
    stream_of,
    truth_of,
    write,
)

VIDEO_CONTAINERS = ("mp4", "mov", "matroska", "webm", "mpegts", "avi", "gif")
# (a, b, c, d) of a display matrix, in all eight orientations: x' = a x + c y, y' = b x + d y.
ORIENTATIONS = (
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
)


def _constant(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, even(60, 10))
    return write(made), truth_of(made)


def _variable(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, VARIABLE)
    return write(made), truth_of(made)


def _lying_header(container: str) -> tuple[bytes, Truth]:
    """The header says 30 pictures a second, there are 4."""
    made = recipe(container, even(24, 4), rate=30)
    stored = 1 / 30 if container in ("mp4", "mov") else 1 / 4  # what the file says of its last picture
    return write(made), truth_of(made, duration=5.75 + stored)


def _offset(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, even(60, 10), shift=7.3)
    return write(made), truth_of(made)


def _edit_list(container: str) -> tuple[bytes, Truth]:
    """A stream copy cut at 2.5 s: the pictures from the key frame on are there, an edit list hides them."""
    made = recipe(container, even(60, 10), shift=-2.5, options={"avoid_negative_ts": "disabled"}, gop=100)
    return write(made), truth_of(made, stamps=even(35, 10), numbers=list(range(25, 60)), duration=3.5)


def _b_frames(container: str) -> tuple[bytes, Truth]:
    options = {"preset": "medium", "b-pyramid": "normal", "b_strategy": "0"} if CODEC[container] == "libx264" else {}
    made = recipe(container, even(60, 10), b_frames=2, codec_options=options)
    return write(made), truth_of(made)


def _open_gop(container: str) -> tuple[bytes, Truth]:
    options = {"preset": "medium", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
    made = recipe(container, even(60, 10), b_frames=3, codec_options=options)
    return write(made), truth_of(made)


def _wrap(container: str) -> tuple[bytes, Truth]:
    """The 33-bit clock of MPEG-TS comes to its end after three seconds."""
    made = recipe(container, even(60, 10), shift=2**33 / 90000 - 3.0, options={"avoid_negative_ts": "disabled"})
    return write(made), truth_of(made)


def _join(container: str) -> tuple[bytes, Truth]:
    first = recipe(container, even(30, 10))
    second = recipe(container, even(30, 10), first=30)
    return write(first) + write(second), truth_of(recipe(container, even(60, 10)), warning="time stamps jump")


def _mid_gop(container: str) -> tuple[bytes, Truth]:
    """The recording begins in the middle of a group of pictures."""
    made = recipe(container, even(60, 10), keep=lambda number, _: number >= 6)
    return write(made), truth_of(
        made, stamps=even(48, 10), numbers=list(range(12, 60)), duration=4.8, warning="key frame"
    )


def _size_change(container: str) -> tuple[bytes, Truth]:
    """Half as large from the third second on."""
    truth = truth_of(recipe(container, even(60, 10)), warning="size changes")
    if container == "mpegts":
        first = recipe(container, even(30, 10))
        second = recipe(container, even(30, 10), first=30, size=(96, 64), shift=3.0)
        return write(first) + write(second), truth
    first = recipe("webm", even(30, 10))
    second = recipe("webm", even(30, 10), first=30, size=(96, 64), shift=3.0)
    return _appended(container, first, second), truth


def _appended(container: str, first: Recipe, second: Recipe) -> bytes:
    """The packets of two recordings in one stream with the header of the first."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = stream_of(out, first, first.codec)
        helper = av.open(io.BytesIO(), "w", format=container)
        packets = list(encode(stream, first))
        later = stream_of(helper, second, second.codec)
        for packet in [*packets, *encode(later, second)]:
            packet.stream = stream
            out.mux(packet)
    return sink.getvalue()


def _two_streams(container: str) -> tuple[bytes, Truth]:
    """The default stream is the second; the first holds one picture, number 4095."""
    made = recipe(container, even(60, 10), extra="first_stream")
    return write(made), truth_of(made)


def _cover(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, even(60, 10), extra="cover")
    return write(made), truth_of(made)


def _fragmented(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, even(60, 10), options={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    return write(made), truth_of(made)


def _no_duration(container: str) -> tuple[bytes, Truth]:
    """A live recording: neither duration nor index."""
    made = recipe(container, VARIABLE, options={"live": "1"})
    return write(made), truth_of(made)


def _one_picture(container: str) -> tuple[bytes, Truth]:
    made = recipe(container, [0.0], last_duration=0.1)
    return write(made), truth_of(made)


def _odd_sizes(container: str) -> tuple[bytes, Truth]:
    codec = {"avi": "mjpeg", "mpegts": "libx264"}.get(container, CODEC[container])
    pix_fmt = {"libx264": "yuv444p", "mjpeg": "yuvj444p", "gif": "rgb8"}.get(codec, "yuv420p")
    made = recipe(container, even(20, 10), size=(189, 121), codec=codec, pix_fmt=pix_fmt)
    return write(made), truth_of(made)


def _turned(matrix: tuple[int, int, int, int]) -> Callable[[str], tuple[bytes, Truth]]:
    def clip(container: str) -> tuple[bytes, Truth]:
        a, b, c, d = matrix
        full = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        made = recipe(container, even(60, 10), matrix=full)
        size = made.size if a else made.size[::-1]
        return write(made), truth_of(made, turn=matrix, size=size)

    return clip


_EVERY = VIDEO_CONTAINERS
_STAMPED = ("mp4", "mov", "matroska", "webm", "mpegts", "gif")
KINDS: dict[str, tuple[Callable[[str], tuple[bytes, Truth]], tuple[str, ...]]] = {
    "constant rate": (_constant, _EVERY),
    "variable rate": (_variable, _STAMPED),
    "header rate lies": (_lying_header, ("mp4", "mov", "matroska", "webm", "mpegts")),
    "offset start": (_offset, ("mp4", "mov", "matroska", "webm", "mpegts")),
    "edit list": (_edit_list, ("mp4", "mov")),
    "B-frames": (_b_frames, ("mp4", "mov", "matroska", "mpegts", "avi")),
    "open GOP": (_open_gop, ("mp4", "mov", "matroska", "mpegts")),
    "clock wraps": (_wrap, ("mpegts",)),
    "joined": (_join, ("mpegts",)),
    "mid-GOP start": (_mid_gop, ("matroska", "webm", "mpegts", "mp4")),
    "size change": (_size_change, ("webm", "matroska", "mpegts")),
    "two streams": (_two_streams, ("mp4", "mov", "matroska")),
    "cover art": (_cover, ("mp4", "matroska")),
    "fragmented": (_fragmented, ("mp4", "mov")),
    "no duration": (_no_duration, ("matroska", "webm")),
    "one picture": (_one_picture, _EVERY),
    "odd sizes": (_odd_sizes, _EVERY),
    **{f"orientation {m}": (_turned(m), ("mp4", "mov")) for m in ORIENTATIONS},
}
CASES = [(kind, container) for kind, (_, containers) in KINDS.items() for container in containers]


def make(kind: str, container: str) -> tuple[bytes, Truth]:
    """A clip of that kind in that container, and what is right."""
    return KINDS[kind][0](container)


def upright(picture: np.ndarray, truth: Truth) -> np.ndarray:
    """A shown picture as it was before its display matrix turned it, so that its number can be read."""
    a, b, c, d = truth.turn
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[0 : (height if a else width), 0 : (width if a else height)]
    x, y = a * columns + c * rows, b * columns + d * rows
    return picture[y - y.min(), x - x.min()]


def faults(frames: np.ndarray, times: Sequence[float], truth: Truth, size_matters: bool = True) -> list[str]:
    """What is wrong with frames that claim to be on screen at those times; empty: nothing."""
    found = []
    if len(frames) != len(times):
        return [f"{len(frames)} frames, {len(times)} times"]
    if not len(frames):
        return ["no frame"]
    wrong = [
        f"{time:.3f} s shows {number_of(upright(frame, truth))}, not {sorted(truth.shown(time))}"
        for frame, time in zip(frames, times, strict=True)
        if number_of(upright(frame, truth)) not in truth.shown(time)
    ]
    if wrong:
        found.append(f"{len(wrong)} of {len(times)} wrong: {wrong[0]}")
    if times[-1] < truth.duration - max(1.0, truth.duration - truth.stamps[-1]) - 0.02:
        found.append(f"ends at {times[-1]:.2f} s of {truth.duration:.2f} s")
    if size_matters and frames.shape[1:3] != truth.size[::-1]:
        found.append(f"size {frames.shape[2]}x{frames.shape[1]}, not {truth.size}")
    return found
