"""``video/jpeg``: a video sent as JPEGs with commas between them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from score_vllm.models.media_url import decode_base64
from score_vllm.models.video_loaders import decode_limits
from score_vllm.models.video_options import SampledMetadata, VideoOptions
from score_vllm.video import DecodedVideo, DecodeLimits, Resize, VideoError
from score_vllm.video.sampling import DEFAULT_FPS, choose

LOADER = "jpeg_sequence"


def load_jpeg_sequence(
    payload: str,
    *,
    num_frames: int,
    fps: float = DEFAULT_FPS,
    options: VideoOptions,
    resize: dict[str, Any] | None = None,
    **limits: Any,
) -> tuple[np.ndarray, SampledMetadata]:
    """``(frames [F, H, W, 3] uint8, metadata)`` of the pictures in the window, spread evenly where they are too many.

    Args:
        payload: base64 JPEGs with commas between.
        num_frames: most frames to read.
        fps: rate the pictures were taken at, where the options name none.
        options: of the request.
        resize: of :class:`score_vllm.video.Resize`.
        **limits: of :class:`score_vllm.video.DecodeLimits`.

    Raises:
        VideoError: a picture that is none, sizes that differ, or a limit.
    """
    bounds = decode_limits(limits)
    if len(payload) > bounds.max_bytes:
        raise VideoError(f"the video has {len(payload)} bytes, more than max_bytes = {bounds.max_bytes}")
    # Some clients put the head of a data URL before every picture.
    parts = [part for part in payload.split(",") if not part.startswith("data:")]
    if len(parts) > bounds.max_source_frames:
        raise VideoError(f"the video has more than max_source_frames = {bounds.max_source_frames} frames")
    rate = options.fps or fps
    most = min(num_frames, options.max_frames or num_frames)
    duration = len(parts) / rate
    if duration > bounds.max_duration:
        raise VideoError(
            f"{len(parts)} frames at video_fps = {rate:g} last {duration:.0f} s, more than "
            f"max_duration = {bounds.max_duration:g} s"
        )
    stamps = [index / rate for index in range(len(parts))]
    sample = choose(stamps, duration, fps=None, max_frames=most, start=options.start, end=options.end, temporal_merge=1)
    chosen = [int(index) for index in sample.indices]
    rule = None if resize is None else Resize(**resize)
    size = (0, 0)
    for row, index in enumerate(chosen):
        try:
            with Image.open(io.BytesIO(decode_base64(parts[index])), formats=("JPEG",)) as picture:
                if row == 0:
                    size = picture.size  # from the header: nothing is decoded
                    height, width = (size[1], size[0]) if rule is None else rule.size(len(chosen), size[1], size[0])
                    _check_size(size, len(chosen) * height * width * 3, bounds)
                    frames = np.empty((len(chosen), height, width, 3), dtype=np.uint8)
                if picture.size != size:
                    raise VideoError(
                        f"frame {index} of the video/jpeg sequence has {picture.width}x{picture.height} pixels, but "
                        f"frame {chosen[0]} has {size[0]}x{size[1]}; all frames must have one size"
                    )
                rgb = picture.convert("RGB")
                if size != (width, height):
                    rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
                frames[row] = np.asarray(rgb)
        except VideoError:
            raise
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            text = "is not a JPEG" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded: {error}"
            raise VideoError(f"frame {index} of the video/jpeg sequence {text}") from error
    video = DecodedVideo(
        frames=frames,
        times=sample.times,
        duration=duration,
        window=sample.window,
        total_frames=len(parts),
        source_fps=rate,
        source_size=size,
        step=sample.step,
    )
    return frames, SampledMetadata(video.metadata(LOADER), video.report(), video.times.tolist())


def _check_size(size: tuple[int, int], total: int, limits: DecodeLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise VideoError(
            f"the frames of the video have {width}x{height} pixels, more than max_pixels = {limits.max_pixels}"
        )
    if total > limits.max_output_bytes:
        raise VideoError(
            f"the frames of the video have {total} bytes, more than max_output_bytes = {limits.max_output_bytes}; "
            "send fewer or smaller ones"
        )
