"""score-vllm's video loaders in vLLM's registry: ``score_pyav`` (the default of score-serve) and ``score_decord``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from score_vllm.models.video_options import SampledMetadata, VideoOptions
from score_vllm.video import DecodeLimits, Resize
from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES
from score_vllm.video.sandbox import decode_video_isolated

PYAV_LOADER = "score_pyav"
DECORD_LOADER = "score_decord"


def decode_limits(options: dict[str, Any]) -> DecodeLimits:
    """Limits from what is left of ``media_io_kwargs.video``.

    Raises:
        ValueError: unknown keys, or values out of range.
    """
    known = set(DecodeLimits.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"media_io_kwargs.video has unknown keys {unknown}; known are {sorted(known)}, fps, num_frames, resize"
        )
    return DecodeLimits(**options)


def model_resize(info: Any) -> Resize | None:
    """The size that a model's processor gives a video's frames, so that they can be decoded at it.

    Args:
        info: vLLM's processing info of the model.
    """
    resize = Resize.for_processor(info.get_hf_processor().video_processor)
    if resize is None:
        return None
    size = info.resolve_video_kwargs({})["videos_kwargs"]["size"]
    return replace(resize, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])


class ScoreVideoLoader(VideoLoader):
    """Decoding under limits, in a process of its own; see :mod:`score_vllm.video.sandbox`."""

    name: ClassVar[str]
    backend: ClassVar[str]

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = DEFAULT_MAX_FRAMES,
        fps: float = DEFAULT_FPS,
        *,
        options: VideoOptions | None = None,
        resize: dict[str, Any] | None = None,
        **limits: Any,
    ) -> tuple[np.ndarray, SampledMetadata]:
        """``(frames [F, H, W, 3] uint8, metadata)``.

        Args:
            data: the file's bytes.
            num_frames: most frames to read.
            fps: frames per second to read.
            options: of the request, which take the place of ``fps`` and lower ``num_frames``.
            resize: of :class:`score_vllm.video.Resize`, the size that the model's processor will ask for.
            **limits: of :class:`score_vllm.video.DecodeLimits`.

        Raises:
            ValueError: the file cannot be decoded, or a limit.
            DecoderBusyError: too much is waiting already.
            DecoderUnavailableError: this machine cannot decode at the moment.
        """
        asked = options or VideoOptions()
        video = decode_video_isolated(
            data,
            backend=cls.backend,
            fps=asked.fps or fps,
            max_frames=min(num_frames, asked.max_frames or num_frames),
            start=asked.start,
            end=asked.end,
            resize=None if resize is None else Resize(**resize),
            limits=decode_limits(limits),
        )
        return video.frames, SampledMetadata(video.metadata(cls.name), video.report(), video.times.tolist())


@VIDEO_LOADER_REGISTRY.register(PYAV_LOADER)
class PyAVVideoLoader(ScoreVideoLoader):
    """Decoding with PyAV."""

    name = PYAV_LOADER
    backend = "pyav"


@VIDEO_LOADER_REGISTRY.register(DECORD_LOADER)
class DecordVideoLoader(ScoreVideoLoader):
    """Decoding with decord, on what its FFmpeg of 2019 can read."""

    name = DECORD_LOADER
    backend = "decord"
