"""Fills ``--media-io-kwargs``: which loader reads videos, how many frames, under which limits."""

from __future__ import annotations

import argparse
import os
from typing import Any

from score_vllm.architectures import Architecture
from score_vllm.catalog import UsageError
from score_vllm.config import MEDIA_CONNECTOR
from score_vllm.video.sampling import MAX_FPS

LOADERS = {"pyav": "score_pyav", "decord": "score_decord", "vllm": None}
MAX_DOWNLOAD_BYTES = 1 << 30
MAX_VIDEOS_PER_PROMPT = 8


def apply_media_options(args: argparse.Namespace, architecture: Architecture) -> int:
    """Our loader, the family's sampling and a download cap, under what ``--media-io-kwargs`` says.

    Returns:
        The most frames of a video.

    Raises:
        UsageError: ``--media-io-kwargs`` lifts the limit of frames, or says what our loaders would refuse of any video.
    """
    fps, max_frames = architecture.sampling
    given = dict(args.media_io_kwargs or {})
    frames = max_frames if args.max_frames is None else args.max_frames
    video: dict[str, Any] = {"num_frames": frames}
    if (loader := LOADERS[args.video_loader]) is not None:
        video |= {"video_backend": loader, "fps": fps or 0, "max_bytes": MAX_DOWNLOAD_BYTES}
    else:
        # vLLM picks a loader for Qwen that goes by rate and heeds this name only.
        video["max_frames"] = frames
    if args.fps is not None:
        video["fps"] = args.fps
    asked = dict(given.get("video", {}))
    if asked.get("video_backend", loader) != loader:
        video.pop("max_bytes", None)  # a key of our loaders
        video.pop("video_backend", None)
    video |= asked
    for name in {"num_frames", "max_frames"} & set(video):
        if not isinstance(video[name], int) or video[name] < 1:
            raise UsageError(
                f"--media-io-kwargs: video.{name} must be an integer >= 1, got {video[name]!r}: memory is reserved for "
                "this many frames"
            )
    if video.get("video_backend", "") in LOADERS.values():
        _check_loader_options(video)
    args.media_io_kwargs = {**given, "video": video}
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
    if "video" not in args.limit_mm_per_prompt:
        # vLLM's default is 999: as many decoded videos as that would have to fit in memory at once.
        args.limit_mm_per_prompt = {**args.limit_mm_per_prompt, "video": MAX_VIDEOS_PER_PROMPT}
    return max(video["num_frames"], video.get("max_frames", 1))


def _check_loader_options(video: dict[str, Any]) -> None:
    from score_vllm.models.video_loaders import decode_limits

    rate = video.get("fps", 0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= MAX_FPS:
        raise UsageError(
            f"--media-io-kwargs: video.fps must be a number in [0, {MAX_FPS}], got {rate!r}; 0 is evenly over the video"
        )
    try:
        decode_limits({k: v for k, v in video.items() if k not in ("video_backend", "fps", "num_frames", "resize")})
    except ValueError as error:
        raise UsageError(f"--media-io-kwargs: {error}") from error
