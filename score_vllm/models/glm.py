"""GLM-4.1V and GLM-4.6V-Flash (dense), GLM-4.5V and GLM-4.6V (mixture of experts) with compressed videos.

The span of a video is, per cell, ``<|begin_of_image|>``, its vision rows, ``<|end_of_image|>`` and its time in words.
Times are the processor's own; vLLM cuts GLM-4.6V's to whole seconds and drops a frame that is read twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout
from score_vllm.models.admission import AdmissionDummyInputsMixin, FramePixelsInfoMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.qwen import QwenModelMixin, grid_of
from score_vllm.types import VideoGrid
from score_vllm.vision.glm import cell_seconds, glm_layout

# Longer than any video that a server takes.
_LONGEST = 99999.9


class ScoreGlm4vInfo(FramePixelsInfoMixin, Glm4vProcessingInfo):
    """Counts videos by the server's own limits. The processor's limit of pixels is of a whole video."""

    _get_vision_size = staticmethod(Qwen2VLProcessingInfo._get_vision_size)

    def video_layout(self, grid: VideoGrid, seconds: Sequence[float]) -> VideoLayout:
        """The span of a video whose cells stand at these seconds."""
        encode = partial(self.get_tokenizer().encode, add_special_tokens=False)
        return glm_layout(grid, seconds, encode, self.get_hf_config(), self.get_hf_processor())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """vLLM takes one video; several are exact here."""
        return super().get_supported_mm_limits() if self._serving is None else {"image": None, "video": None}

    def get_image_size_with_most_features(self, max_pixels: int | None = None) -> Any:
        """As vLLM's for images, and for the frames of a video with so many pixels."""
        if max_pixels is None:
            return super().get_image_size_with_most_features()
        return Qwen2VLProcessingInfo.get_image_size_with_most_features(self, max_pixels)  # type: ignore[arg-type]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """vLLM leaves GLM-4.1V's to its dummy video, whose times are shorter than others'."""
        if self._serving is None:
            return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        limit = self.video_limit
        most = {"image": self.get_max_image_tokens(), "video": limit.tokens + limit.structure_tokens}
        return {name: count for name, count in most.items() if mm_counts.get(name, 0) > 0}

    def frames_per_limit(self) -> int:
        """Of a whole video, rounded up to whole cells."""
        return self.cells() * self.get_hf_config().vision_config.temporal_patch_size

    def max_structure_tokens(self) -> int:
        """Of a video of the most cells."""
        return self.cells() * self.video_layout(VideoGrid(1, 1, 1), [_LONGEST]).structure_tokens


class ScoreGlm4vDummyInputsBuilder(AdmissionDummyInputsMixin, Glm4vDummyInputsBuilder):
    """Profiles with the largest video admitted."""


class ScoreGlm4vProcessor(CompressionProcessorMixin, Glm4vMultiModalProcessor):
    """Cells between markers, each a position grid of its own. Frames take the image's token."""

    takes_embeddings = False

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        processor = info.get_hf_processor()
        self._setup_compression(processor.video_token, processor.image_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """From patch grids and the frames' metadata."""
        merge_size = self.info.get_hf_config().vision_config.spatial_merge_size
        layouts = []
        for number, thw in enumerate(data.get("video_grid_thw", ())):
            grid, metadata = grid_of(thw, merge_size), items.metadata[number]
            seconds = [index / metadata["fps"] for index in metadata["frames_indices"]]
            layouts.append(self.info.video_layout(grid, cell_seconds(seconds, grid.t)))
        return layouts


@MULTIMODAL_REGISTRY.register_processor(
    ScoreGlm4vProcessor, info=ScoreGlm4vInfo, dummy_inputs=ScoreGlm4vDummyInputsBuilder
)
class ScoreGlm4vForConditionalGeneration(QwenModelMixin, Glm4vForConditionalGeneration):
    """GLM-4.1V and GLM-4.6V-Flash."""

    # The encoder's graphs are for Qwen's towers.
    graphs_take_videos = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As vLLM's, which would insist on its own type of video input."""
        if self.compressor is None:
            return super().embed_multimodal(**kwargs)
        rows: tuple[torch.Tensor, ...] = ()
        for modality, inputs in self._parse_and_validate_multimodal_inputs(**kwargs).items():
            process = self._process_image_input if modality == "image" else self._process_video_input
            rows += tuple(process(inputs))
        return rows


@MULTIMODAL_REGISTRY.register_processor(
    ScoreGlm4vProcessor, info=ScoreGlm4vInfo, dummy_inputs=ScoreGlm4vDummyInputsBuilder
)
class ScoreGlm4vMoeForConditionalGeneration(ScoreGlm4vForConditionalGeneration, Glm4vMoeForConditionalGeneration):
    """GLM-4.5V and GLM-4.6V."""
