"""InternVL3 and InternVL3.5 in transformers' format with compressed videos.

The span of a video is, per frame, ``Frame1: <img>``, its vision rows, ``</img>``; a frame is 448 x 448 pixels and 256
rows, whatever the file's size. Positions are 1-D: :mod:`score_vllm.models.sequential`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout
from score_vllm.models.admission import AdmissionDummyInputsMixin, AdmissionInfoMixin, VideoLimit
from score_vllm.models.frames import FrameModelMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.vision.internvl import internvl_layout, merge_size, units
from score_vllm.vision.saliency import KINDS


class ScoreInternVLInfo(AdmissionInfoMixin, InternS1ProcessingInfo):
    """Counts a video's tokens by its layout."""

    def video_layout(self, num_frames: int) -> VideoLayout:
        """The span of a video of so many frames."""
        encode = partial(self.get_tokenizer().encode, add_special_tokens=False)
        return internvl_layout(num_frames, encode, self.get_hf_config(), self.get_hf_processor())

    @cached_property
    def video_limit(self) -> VideoLimit:
        """Frames have one size, whatever the file's."""
        frames = self.serving.max_frames
        height, width = self.get_hf_config().vision_config.image_size
        layout = self.video_layout(frames)
        return VideoLimit(frames, None, height, width, layout.grid.num_tokens, layout.structure_tokens)


class ScoreInternVLDummyInputs(AdmissionDummyInputsMixin, InternS1DummyInputsBuilder):
    """Profiles with the longest video admitted."""


class ScoreInternVLProcessor(CompressionProcessorMixin, InternS1MultiModalProcessor):
    """Numbered square frames, one position per token."""

    takes_embeddings = False

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """From the number of frames of each video."""
        return [self.info.video_layout(int(count)) for count in data.get("video_num_patches", ())]

    def video_pixels(self, data: Mapping[str, Any], layouts: Sequence[VideoLayout]) -> list[torch.Tensor | None]:
        """Frames of all videos in one tensor; a frame is a cell."""
        return list(data["pixel_values_videos"].split([layout.grid.t for layout in layouts]))


@MULTIMODAL_REGISTRY.register_processor(
    ScoreInternVLProcessor, info=ScoreInternVLInfo, dummy_inputs=ScoreInternVLDummyInputs
)
class ScoreInternVLForConditionalGeneration(FrameModelMixin, InternS1ForConditionalGeneration, SupportsMRoPE):
    """InternVL whose videos enter the language model as S + K rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)

    @property
    def last_attention(self) -> Any:
        """Of InternViT."""
        return self.vision_tower.encoder.layer[-1].attention

    def frame_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected, four patches to a row."""
        return self.extract_feature(pixels)

    def frame_saliency(self, kind: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Every rank holds all heads of this tower."""
        heads, num_frames = self.last_attention.num_heads, len(query)
        query, key = (units(tensor.unflatten(-1, (heads, -1)), self.config) for tensor in (query, key))
        return KINDS[kind](query, key, num_frames, merge_size(self.config) ** 2) / heads

    def _process_vision_input(self, image_input: Any) -> Any:
        """Rows of each image, or of each video, encoded and selected one video at a time."""
        if not isinstance(image_input, tuple):
            return super()._process_vision_input(image_input)
        videos, fields = image_input
        frames = videos["pixel_values"].split([int(count) for count in videos["num_patches"]])
        return self.compress_videos(fields, self._encode_videos(frames, fields))
