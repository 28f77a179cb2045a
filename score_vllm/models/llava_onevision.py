"""LLaVA-OneVision and LLaVA-Video (converted by ``python -m score_vllm.convert_llava_video``) with compressed videos.

One architecture with two options of its config. ``mm_spatial_pool_mode``: how the tower's grid of a frame is halved,
``bilinear`` (rounded up, OneVision) or ``average`` (rounded down, LLaVA-Video). ``mm_newline_position``: where the
learned newline stands, ``one_token`` after the video (OneVision), ``frame`` after each frame, or ``grid`` after each
row of each frame (LLaVA-Video). Newlines always stay. Positions are 1-D: :mod:`score_vllm.models.sequential`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
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

from score_vllm.layout import VideoLayout, sequential_layout
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.admission import AdmissionDummyInputsMixin, AdmissionInfoMixin, VideoLimit
from score_vllm.models.cells import ROWS
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.saliency import check_saliency_config
from score_vllm.types import VideoGrid
from score_vllm.vision.cell_cache import device_index
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
    CompressionModelMixin, LlavaOnevisionForConditionalGeneration, SupportsMRoPE
):
    """LLaVA-OneVision or LLaVA-Video whose videos enter the language model as S + K rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._listening = False
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self._attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn
            self._attention.attn.register_forward_pre_hook(self._keep)

    @property
    def learned_row(self) -> torch.Tensor:
        """The newline."""
        return self.image_newline

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """An image is a run of tokens."""
        return sequential_layout(VideoGrid(1, 1, length), [[]], [[]])

    def apply_pooling(self, image_features: torch.Tensor, stride: int = 2) -> torch.Tensor:
        """[F, N, D] of projected frames [F, P, D]."""
        return pool_frames(self.config, image_features)

    def _keep(self, module: Any, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._captured = args[0], args[1]

    def _saliency(self, kind: str) -> torch.Tensor:
        """[T, N] of the frames that the tower has just seen: its last layer's attention, pooled like the features."""
        assert self._captured is not None, "the tower has not run"
        # [F, P, heads * d] of this rank's heads.
        heads, width = self._attention.num_heads_per_partition, self._attention.head_dim
        query, key = (tensor.reshape(-1, heads, width) for tensor in self._captured)
        num_frames, self._captured = len(self._captured[0]), None
        summed = KINDS[kind](query, key, num_frames, 1)
        if self._attention.tp_size > 1:
            summed = tensor_model_parallel_all_reduce(summed)
        return pool_frames(self.config, (summed / self._attention.num_heads)[..., None])[..., 0]

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        video_input = super()._parse_and_validate_video_input(**kwargs)
        return video_input if self.compressor is None or video_input is None else (video_input, kwargs)

    def _process_video_pixels(self, inputs: Any) -> Any:
        """Rows of each video, encoded and selected one video at a time."""
        if self.compressor is None:
            return super()._process_video_pixels(inputs)
        videos, fields = inputs
        return self.compress_videos(fields, self._encode_videos(videos["pixel_values_videos"], fields))

    def _encode_videos(
        self, videos: Any, fields: Mapping[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for index, (pixels, kind) in enumerate(zip(videos, self.saliency_kinds(fields), strict=True)):
            yield self.encode_cells(fields, index, kind, partial(self._encode_some, pixels, kind))

    def _encode_some(self, pixels: torch.Tensor, kind: str | None, frames: list[int]) -> dict[str, torch.Tensor]:
        """The tower on some frames [F, ...] of a video; each is a cell."""
        self._listening = kind is not None
        chosen = pixels
        if len(frames) < len(pixels):
            chosen = pixels.index_select(0, device_index(frames, pixels.device))
        values = {ROWS: self._video_pixels_to_features(self.vision_tower, chosen)}
        self._listening = False
        if kind is not None:
            values[kind] = self._saliency(kind)
        return values
