"""From the bytes of a video file to the frames that the model sees, with limits; needs neither vllm nor torch."""

from score_vllm.video.container import (
    DecodeLimits,
    DecoderBusyError,
    DecoderUnavailableError,
    VideoDeadlineError,
    VideoError,
    VideoWindowError,
)
from score_vllm.video.decode import decode_video
from score_vllm.video.picture import Resize
from score_vllm.video.result import DecodedVideo

__all__ = [
    "DecodeLimits",
    "DecodedVideo",
    "DecoderBusyError",
    "DecoderUnavailableError",
    "Resize",
    "VideoDeadlineError",
    "VideoError",
    "VideoWindowError",
    "decode_video",
]
