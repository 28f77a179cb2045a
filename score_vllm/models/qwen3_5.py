"""Qwen3.5 and Qwen3.6 with compressed videos: Qwen3-VL's processor and span, another language model.

Three of four layers are gated delta nets, which read no positions: there a dropped token is one update of the state
less, and its decay is skipped. Kept tokens stand at their original positions in the full-attention layers.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.models.qwen3_vl import (
    ScoreQwen3VLDummyInputsBuilder,
    ScoreQwen3VLForConditionalGeneration,
    ScoreQwen3VLInfoMixin,
    ScoreQwen3VLProcessor,
)


class ScoreQwen3_5Info(ScoreQwen3VLInfoMixin, Qwen3_5ProcessingInfo):
    """Dense."""


class ScoreQwen3_5MoeInfo(ScoreQwen3VLInfoMixin, Qwen3_5MoeProcessingInfo):
    """Mixture of experts."""


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen3VLProcessor, info=ScoreQwen3_5Info, dummy_inputs=ScoreQwen3VLDummyInputsBuilder
)
class ScoreQwen3_5ForConditionalGeneration(ScoreQwen3VLForConditionalGeneration, Qwen3_5ForConditionalGeneration):
    """Dense Qwen3.5 and Qwen3.6."""


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen3VLProcessor, info=ScoreQwen3_5MoeInfo, dummy_inputs=ScoreQwen3VLDummyInputsBuilder
)
class ScoreQwen3_5MoeForConditionalGeneration(ScoreQwen3VLForConditionalGeneration, Qwen3_5MoeForConditionalGeneration):
    """Qwen3.5 and Qwen3.6 with a mixture of experts."""
