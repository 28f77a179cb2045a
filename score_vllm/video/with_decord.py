"""Reading the chosen pictures with decord, where decord reads the file rightly."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np

from score_vllm.video.picture import Painter, orientation
from score_vllm.video.timeline import Timeline

# Containers that state the picture's size once.
CONTAINERS = ("mov", "avi", "matroska", "flv")


def why_not(container: Any, stream: Any, timeline: Timeline, first: Any) -> str:
    """What decord would get wrong about this file; empty: nothing known.

    Args:
        container, stream, timeline: of the file.
        first: its first picture as PyAV decodes it.
    """
    container_name, codec = container.format.name, stream.codec_context.codec.canonical_name
    if not any(name in container_name.split(",") for name in CONTAINERS) or codec in ("vp8", "vp9", "av1"):
        return f"in {container_name} with {codec} the picture's size may change, which decord hides"
    if timeline.hidden:
        return "an edit list hides some pictures"
    if timeline.rewritten or len(timeline.ticks) != len(timeline.pts):
        return "its time stamps had to be repaired"
    if (np.minimum.reduceat(timeline.pts, timeline.keys) < timeline.pts[timeline.keys]).any():
        return "its groups of pictures are open, where decord's seeking gives wrong pictures"
    if len(container.streams.video) > 1:
        return "it has several video streams"
    if orientation(first) != (1, 0, 0, 1):
        return "it is turned or mirrored"
    if stream.sample_aspect_ratio not in (None, 0, 1):
        return "its pixels are not square"
    return ""


def read(
    data: bytes | memoryview,
    timeline: Timeline,
    indices: np.ndarray,
    painter: Painter,
    frames: np.ndarray,
    threads: int,
) -> str:
    """Fill ``frames`` [F, height, width, 3] with the pictures of those ``indices``.

    Returns:
        Why it could not be done; empty where it was.
    """
    import decord

    reader = None
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=threads)
        count = len(timeline.ticks)
        if len(reader) != count:
            return f"decord counts {len(reader)} pictures, the file has {count}"
        if count > 1:
            begins = reader.get_frame_timestamp(range(count))[:, 0]
            off = np.abs(begins - begins[0] - timeline.stamps).max()
            if off > np.diff(timeline.stamps).min() / 2:
                return f"decord's time stamps are up to {off:.3f} s off"
        for row, index in enumerate(indices.tolist()):
            if row and index == indices[row - 1]:
                frames[row] = frames[row - 1]
                continue
            picture = np.ascontiguousarray(reader[index].asnumpy())
            painter.paint(av.VideoFrame.from_ndarray(picture, format="rgb24"), frames[row])
    except (decord.DECORDError, IndexError) as error:
        return f"decord cannot decode it: {' '.join(str(error).split())[:160]}"
    finally:
        del reader  # it decodes ahead without bound while it is open
    return ""
