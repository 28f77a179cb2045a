"""score-vllm: SCORE video-token compression (arXiv 2603.26365) for vLLM.

The names below are the library's public surface; importing them needs neither vllm nor triton.
"""

from score_vllm.budget import num_retained_tokens
from score_vllm.policy import RetentionPolicy
from score_vllm.select import select_tokens
from score_vllm.types import TokenSelection, VideoGrid

__version__ = "0.1.0"

__all__ = ["RetentionPolicy", "TokenSelection", "VideoGrid", "num_retained_tokens", "select_tokens"]
