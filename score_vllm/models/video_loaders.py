"""score-vllm's video loaders in vLLM's registry: ``score_pyav`` (the default of score-serve) and ``score_decord``.

Nothing here changes what other models of the process read: limits that vLLM has no place for come with a media
connector of our own, which score-serve names in ``VLLM_MEDIA_CONNECTOR``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pybase64
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from score_vllm.config import MEDIA_CONNECTOR
from score_vllm.video import DecodeLimits, VideoError
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES
from score_vllm.video.sandbox import decode_video_isolated

PYAV_LOADER = "score_pyav"
DECORD_LOADER = "score_decord"


def _limits(options: dict[str, Any]) -> DecodeLimits:
    known = set(DecodeLimits.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"media_io_kwargs.video has unknown keys {unknown}; known are {sorted(known)}, fps, num_frames"
        )
    return DecodeLimits(**options)


@VIDEO_LOADER_REGISTRY.register(PYAV_LOADER)
class PyAVVideoLoader(VideoLoader):
    """Pull-based decoding under limits, in a process of its own; see :mod:`score_vllm.video.sandbox`."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = DEFAULT_MAX_FRAMES,
        fps: float = DEFAULT_FPS,
        **limits: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """``(frames [F, H, W, 3] uint8, metadata)``; raises ValueError for anything that cannot be decoded."""
        video = decode_video_isolated(data, fps=fps, max_frames=num_frames, limits=_limits(limits))
        return video.frames, video.metadata(PYAV_LOADER)


@VIDEO_LOADER_REGISTRY.register(DECORD_LOADER)
class DecordVideoLoader(VideoLoader):
    """Decoding with decord where it can read the file rightly, else as the default loader; in the same sandbox."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = DEFAULT_MAX_FRAMES,
        fps: float = DEFAULT_FPS,
        **limits: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """``(frames [F, H, W, 3] uint8, metadata)``; raises ValueError for anything that cannot be decoded."""
        video = decode_video_isolated(data, fps=fps, max_frames=num_frames, limits=_limits(limits), backend="decord")
        return video.frames, video.metadata(DECORD_LOADER)


class LimitedVideoMediaIO(VideoMediaIO):
    """vLLM's video reader with the limits that it has no place for: bytes while a download runs, and everything about
    ``video/jpeg`` (JPEGs with commas between), which never reaches a loader.

    Args:
        inner: a reader whose loader is one of ours.
    """

    def __init__(self, inner: VideoMediaIO) -> None:
        self.__dict__.update(vars(inner))

    def get_max_bytes(self) -> int | None:
        """Where vLLM stops a download."""
        return self.kwargs.get("max_bytes")

    def load_base64(self, media_type: str, data: str) -> Any:
        """As vLLM's, after a look at the sizes."""
        if media_type.lower() == "video/jpeg":
            options = {k: v for k, v in self.kwargs.items() if k in DecodeLimits.__dataclass_fields__}
            _check_jpeg_sequence(data, self.num_frames, DecodeLimits(**options))
        return super().load_base64(media_type, data)


def limited(media_io: Any) -> Any:
    """A video reader with one of our loaders under its limits; anything else as it is."""
    ours = isinstance(media_io, VideoMediaIO) and isinstance(media_io.video_loader, PyAVVideoLoader | DecordVideoLoader)
    return LimitedVideoMediaIO(media_io) if ours else media_io


@MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)
class LimitedMediaConnector(MediaConnector):
    """vLLM's fetcher of media with :func:`limited` readers; in use where ``VLLM_MEDIA_CONNECTOR`` names it."""

    def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
        """As vLLM's."""
        return super().load_from_url(url, limited(media_io), **options)

    async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
        """As vLLM's."""
        return await super().load_from_url_async(url, limited(media_io), **options)


def _check_jpeg_sequence(data: str, max_frames: int, limits: DecodeLimits) -> None:
    if len(data) > limits.max_bytes:
        raise VideoError(f"the video has {len(data)} bytes, more than max_bytes = {limits.max_bytes}")
    total = 0
    for part in data.split(",", max_frames)[:max_frames]:
        try:
            with Image.open(io.BytesIO(pybase64.b64decode(part, validate=True))) as picture:
                width, height = picture.size  # from the header: nothing is decoded
        except (OSError, Image.DecompressionBombError) as error:
            raise VideoError(f"a frame of the video/jpeg sequence is not a picture: {error}") from error
        total += width * height * 3
        if width * height > limits.max_pixels:
            raise VideoError(f"a frame of the video is {width}x{height}, more than max_pixels = {limits.max_pixels}")
        if total > limits.max_output_bytes:
            raise VideoError(f"the frames of the video are more than max_output_bytes = {limits.max_output_bytes}")
