"""What a request may say about which part of each video is read, and what was read of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """The part of one video to read; None is the operator's value, or the video's own end.

    Attributes:
        start: seconds from the start of the source.
        end: seconds from the start of the source.
        fps: frames per second to read; of a JPEG sequence, the rate it was taken at.
        max_frames: most frames to read.
    """

    start: float | None = None
    end: float | None = None
    fps: float | None = None
    max_frames: int | None = None

    def cache_key(self) -> str:
        """Equal for equal requests, whatever the type of their numbers; empty where nothing was asked."""
        asked = {name: float(value) for name, value in asdict(self).items() if value is not None}
        return repr(asked) if asked else ""


# The options of the videos that the request in progress still has to fetch, in the order of the fetches.
pending_options: ContextVar[Iterator[VideoOptions] | None] = ContextVar("score_pending_options", default=None)
# Where the request in progress collects the seconds of each of its videos' decoding, the wait for a decoder included.
decode_seconds: ContextVar[list[float] | None] = ContextVar("score_decode_seconds", default=None)


class SampledMetadata(dict[str, Any]):
    """vLLM's metadata of a decoded video, whose keys are fixed, with what was read carried beside it.

    Attributes:
        read: :meth:`score_vllm.video.DecodedVideo.report`.
        times: [F] seconds of the frames.
    """

    def __init__(self, metadata: dict[str, Any], read: dict[str, Any], times: Sequence[float]) -> None:
        super().__init__(metadata)
        self.read, self.times = read, times
