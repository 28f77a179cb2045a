"""LLaVA-OneVision and LLaVA-Video (converted by ``python -m score_vllm.convert_llava_video``) with compressed videos.

One architecture with two options of its config. ``mm_spatial_pool_mode``: how the tower's grid of a frame is halved,
``bilinear`` (rounded up, OneVision) or ``average`` (rounded down, LLaVA-Video). ``mm_newline_position``: where the
learned newline stands, ``one_token`` after the video (OneVision), ``frame`` after each frame, or ``grid`` after each
row of each frame (LLaVA-Video). Newlines always stay. Positions are 1-D: :mod:`score_vllm.models.sequential`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout
from score_vllm.models.admission import AdmissionDummyInputsMixin, AdmissionInfoMixin, VideoLimit
from score_vllm.models.frames import FrameModelMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.vision.pooling import frames_layout, pool_frames
from score_vllm.vision.saliency import KINDS


class ScoreLlavaOnevisionInfo(AdmissionInfoMixin, LlavaOnevisionProcessingInfo):
    """Counts a video's tokens by its layout."""

    @cached_property
    def video_limit(self) -> VideoLimit:
        """Frames have one size, whatever the file's."""
        config, frames = self.get_hf_config(), self.serving.max_frames
        layout, side = frames_layout(config, frames), config.vision_config.image_size
        return VideoLimit(frames, None, side, side, layout.grid.num_tokens, layout.structure_tokens)


class ScoreLlavaOnevisionDummyInputs(AdmissionDummyInputsMixin, LlavaOnevisionDummyInputsBuilder):
    """Profiles with the longest video admitted."""


class ScoreLlavaOnevisionProcessor(CompressionProcessorMixin, LlavaOnevisionMultiModalProcessor):
    """Square frames in a row, one position per token."""

    takes_embeddings = False

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """From the number of frames of each video."""
        config = self.info.get_hf_config()
        return [frames_layout(config, len(frames)) for frames in data.get("pixel_values_videos", ())]


@MULTIMODAL_REGISTRY.register_processor(
    ScoreLlavaOnevisionProcessor, info=ScoreLlavaOnevisionInfo, dummy_inputs=ScoreLlavaOnevisionDummyInputs
)
class ScoreLlavaOnevisionForConditionalGeneration(
    FrameModelMixin, LlavaOnevisionForConditionalGeneration, SupportsMRoPE
):
    """LLaVA-OneVision or LLaVA-Video whose videos enter the language model as S + K rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)

    @property
    def learned_row(self) -> torch.Tensor:
        """The newline."""
        return self.image_newline

    def apply_pooling(self, image_features: torch.Tensor, stride: int = 2) -> torch.Tensor:
        """[F, N, D] of projected frames [F, P, D]."""
        return pool_frames(self.config, image_features)

    @property
    def last_attention(self) -> Any:
        """Of the last layer that is used."""
        return self.vision_tower.vision_model.encoder.layers[-1].self_attn

    def frame_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected and pooled."""
        return self._video_pixels_to_features(self.vision_tower, pixels)

    def frame_saliency(self, kind: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Pooled like the features; query and key [F, P, heads * d] are of this rank's heads."""
        attention, num_frames = self.last_attention, len(query)
        heads, width = attention.num_heads_per_partition, attention.head_dim
        summed = KINDS[kind](query.reshape(-1, heads, width), key.reshape(-1, heads, width), num_frames, 1)
        if attention.tp_size > 1:
            summed = tensor_model_parallel_all_reduce(summed)
        return pool_frames(self.config, (summed / attention.num_heads)[..., None])[..., 0]

    def _process_video_pixels(self, inputs: Any) -> Any:
        """Rows of each video, encoded and selected one video at a time."""
        if self.compressor is None:
            return super()._process_video_pixels(inputs)
        videos, fields = inputs
        return self.compress_videos(fields, self._encode_videos(videos["pixel_values_videos"], fields))
