"""From the bytes of a video file to the frames that the model sees, with limits; needs neither vllm nor torch."""

from score_vllm.video.container import DecodeLimits, VideoError
from score_vllm.video.decode import DecodedVideo, decode_video

__all__ = ["DecodeLimits", "DecodedVideo", "VideoError", "decode_video"]
