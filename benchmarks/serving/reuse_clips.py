"""Clips that share temporal cells: a longer source and cuts of it without encoding again, and a slide show."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.clips import FPS, ClipShape, draw_frames, write_frames

# A key frame every so many seconds: a window that begins at one can be cut out.
CUT_SECONDS = 2


def write_source(path: Path, shape: ClipShape, seed: int) -> Path:
    """A clip that can be cut every :data:`CUT_SECONDS`."""
    frames = draw_frames(shape.frames, shape.height, shape.width, seed)
    return write_frames(path, frames, gop_size=CUT_SECONDS * FPS)


def write_slides(path: Path, shape: ClipShape, slides: int, seed: int) -> Path:
    """A slide show: every picture stays on screen for its share of the frames."""
    pictures = [draw_frames(2, shape.height, shape.width, 1000 * seed + i)[0] for i in range(slides)]
    frames = np.stack([pictures[i * slides // shape.frames] for i in range(shape.frames)])
    return write_frames(path, frames, gop_size=shape.frames)


def cut(source: Path, start: float, end: float) -> Path:
    """The part ``[start, end)`` seconds of a source as a file of its own, packets copied; start is a key frame's."""
    import av

    path = source.with_name(f"{source.stem}-{start:g}-{end:g}{source.suffix}")
    handle, name = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(handle)
    with av.open(str(source)) as given, av.open(name, "w") as made:
        stream = given.streams.video[0]
        out = made.add_stream_from_template(stream)
        first = None
        for packet in given.demux(stream):
            if packet.pts is None or not start <= float(packet.pts * stream.time_base) < end:
                continue
            if first is None:
                assert packet.is_keyframe, f"{source.name} cannot be cut at {start:g} s"
                first = packet.pts
            packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, out
            made.mux(packet)
    os.replace(name, path)
    return path


def cells_of(path: Path, max_frames: int, window: tuple[float, float] | None = None) -> list[str]:
    """A digest of each temporal cell that a server reads of a clip, from the decoded pixels alone."""
    from score_vllm.video import decode_video

    start, end = window or (None, None)
    frames = decode_video(path.read_bytes(), max_frames=max_frames, start=start, end=end).frames
    return [hashlib.sha256(frames[i : i + 2].tobytes()).hexdigest() for i in range(0, len(frames), 2)]
