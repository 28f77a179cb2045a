"""Qwen2.5-VL with compressed videos. Registered in the place of vLLM's own class by the plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout, grid_layout
from score_vllm.models.admission import AdmissionDummyInputsMixin, FramePixelsInfoMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.qwen import QwenModelMixin, grid_of


class ScoreQwen2_5_VLProcessingInfo(FramePixelsInfoMixin, Qwen2_5_VLProcessingInfo):
    """Counts videos by the server's own limits."""


class ScoreQwen2_5_VLDummyInputsBuilder(AdmissionDummyInputsMixin, Qwen2_5_VLDummyInputsBuilder):
    """Profiles with the largest video admitted."""


class ScoreQwen2_5_VLProcessor(CompressionProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    """One position grid over the whole video, whose time axis follows the clock."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """No structure rows; positions per cell are seconds per cell times tokens per second."""
        vision = self.info.get_hf_config().vision_config
        grids = [grid_of(thw, vision.spatial_merge_size) for thw in data.get("video_grid_thw", ())]
        seconds = data.get("second_per_grid_ts")
        factors = [1.0] * len(grids) if seconds is None else [float(value) for value in seconds]
        pairs = zip(grids, factors, strict=True)
        return [grid_layout(grid, factor * float(vision.tokens_per_second)) for grid, factor in pairs]


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen2_5_VLProcessor,
    info=ScoreQwen2_5_VLProcessingInfo,
    dummy_inputs=ScoreQwen2_5_VLDummyInputsBuilder,
)
class ScoreQwen2_5_VLForConditionalGeneration(QwenModelMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose videos enter the language model as K rows at their original positions."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokens_per_second = float(vllm_config.model_config.hf_config.vision_config.tokens_per_second)
        self._setup_compression(vllm_config)
