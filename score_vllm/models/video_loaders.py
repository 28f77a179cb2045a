"""score-vllm's video loaders in vLLM's registry: ``score_pyav`` (the default of score-serve) and ``score_decord``."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from score_vllm.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES, sample_frame_indices
from score_vllm.video import DecodedVideo, DecodeLimits, VideoError, decode_video, probe_video

PYAV_LOADER = "score_pyav"
DECORD_LOADER = "score_decord"


def _limits(options: dict[str, Any]) -> DecodeLimits:
    known = set(DecodeLimits.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"media_io_kwargs.video has unknown keys {unknown}; known are {sorted(known)}, fps, num_frames"
        )
    return DecodeLimits(**options)


def _metadata(video: DecodedVideo, backend: str) -> dict[str, Any]:
    return {
        "total_num_frames": video.total_frames,
        "fps": video.fps,
        "duration": video.duration,
        "video_backend": backend,
        "frames_indices": video.indices,
        # The frames are chosen; the model's processor must not choose again.
        "do_sample_frames": False,
    }


@VIDEO_LOADER_REGISTRY.register(PYAV_LOADER)
class PyAVVideoLoader(VideoLoader):
    """Pull-based decoding under limits; see :mod:`score_vllm.video`."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = DEFAULT_MAX_FRAMES,
        fps: float = DEFAULT_FPS,
        **limits: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """``(frames [F, H, W, 3] uint8, metadata)``; raises ValueError for anything that cannot be decoded."""
        video = decode_video(data, fps=fps, max_frames=num_frames, limits=_limits(limits))
        return video.frames, _metadata(video, PYAV_LOADER)


@VIDEO_LOADER_REGISTRY.register(DECORD_LOADER)
class DecordVideoLoader(VideoLoader):
    """Decoding with decord, after the same checks.

    decord's reader decodes ahead without bound while it is open, so it is closed as soon as the frames are out.
    Its FFmpeg is of 2019 and cannot be stopped by the deadline: prefer the default for untrusted files.
    """

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = DEFAULT_MAX_FRAMES,
        fps: float = DEFAULT_FPS,
        **limits: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """``(frames [F, H, W, 3] uint8, metadata)``; raises ValueError for anything that cannot be decoded."""
        try:
            import decord
        except ImportError as error:
            raise ValueError("video_backend 'score_decord' needs: pip install 'score-vllm[decord]'") from error
        bounds = _limits(limits)
        probe_video(data, bounds)
        reader = None
        try:
            reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
            total, rate = len(reader), float(reader.get_avg_fps())
            wanted = sample_frame_indices(total, rate, fps, num_frames)
            height, width = reader[0].shape[:2]
            if height * width * 3 * len(wanted) > bounds.max_output_bytes:
                raise VideoError(
                    f"{len(wanted)} frames of {width}x{height} pixels are more than "
                    f"max_output_bytes = {bounds.max_output_bytes}; ask for fewer frames"
                )
            frames = reader.get_batch(wanted).asnumpy()
        except (decord.DECORDError, IndexError) as error:
            raise VideoError(f"the file is not a video that decord can decode: {error}") from error
        finally:
            del reader
        return frames, _metadata(DecodedVideo(frames, wanted, total, rate, total / rate), DECORD_LOADER)


def _max_bytes(self: VideoMediaIO) -> int | None:
    """vLLM stops a download at this size; its own video class names none."""
    return self.kwargs.get("max_bytes")


VideoMediaIO.get_max_bytes = _max_bytes
