"""Qwen2-VL with compressed videos: Qwen2.5-VL's span, with one position per cell whatever its duration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout, grid_layout
from score_vllm.models.admission import AdmissionDummyInputsMixin, FramePixelsInfoMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.qwen import QwenModelMixin, grid_of


class ScoreQwen2VLProcessingInfo(FramePixelsInfoMixin, Qwen2VLProcessingInfo):
    """Counts videos by the server's own limits."""


class ScoreQwen2VLDummyInputsBuilder(AdmissionDummyInputsMixin, Qwen2VLDummyInputsBuilder):
    """Profiles with the largest video admitted."""


class ScoreQwen2VLProcessor(CompressionProcessorMixin, Qwen2VLMultiModalProcessor):
    """One position grid over the whole video, a cell apart in time."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """No structure rows."""
        merge_size = self.info.get_hf_config().vision_config.spatial_merge_size
        return [grid_layout(grid_of(thw, merge_size), 1.0) for thw in data.get("video_grid_thw", ())]


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen2VLProcessor, info=ScoreQwen2VLProcessingInfo, dummy_inputs=ScoreQwen2VLDummyInputsBuilder
)
class ScoreQwen2VLForConditionalGeneration(QwenModelMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL whose videos enter the language model as K rows at their original positions."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)
