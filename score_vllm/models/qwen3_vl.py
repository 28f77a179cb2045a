"""Qwen3-VL, dense and mixture of experts, with compressed videos.

The span of a video is, per cell, ``<t.t seconds>``, ``<|vision_start|>``, its vision rows, ``<|vision_end|>``.
Timestamps and markers always stay, also of a cell that keeps nothing. Each row is D (1 + levels) wide: methods read
the first D columns, the tower's deepstack levels travel with the kept rows and are zero in text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.layout import VideoLayout, timestamped_layout
from score_vllm.models.admission import AdmissionDummyInputsMixin, FramePixelsInfoMixin
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.qwen import QwenModelMixin, grid_of
from score_vllm.types import VideoGrid

# Longer than any video that a server takes.
_LONGEST_TIMESTAMP = 99999.9


class ScoreQwen3VLInfoMixin(FramePixelsInfoMixin):
    """Counts the structure rows of a video beside its vision rows. The processor's limit is of a whole video, the
    server's of a frame: it holds for a video of ``--max-frames``, and shorter ones may have larger frames."""

    def video_layout(self, grid: VideoGrid, timestamps: Sequence[float]) -> VideoLayout:
        """The span of a video whose cells stand at these seconds."""
        config, tokenizer = self.get_hf_config(), self.get_tokenizer()  # type: ignore[attr-defined]
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return timestamped_layout(grid, timestamps, encode, config.vision_start_token_id, config.vision_end_token_id)

    def frames_per_limit(self) -> int:
        """Of a whole video, rounded up to whole cells."""
        return self.cells() * self.get_hf_config().vision_config.temporal_patch_size  # type: ignore[attr-defined]

    def max_structure_tokens(self) -> int:
        """Of a video of the most cells."""
        return self.cells() * self.video_layout(VideoGrid(1, 1, 1), [_LONGEST_TIMESTAMP]).structure_tokens


class ScoreQwen3VLDummyInputsBuilder(AdmissionDummyInputsMixin, Qwen3VLDummyInputsBuilder):
    """Profiles with the largest video admitted."""


class ScoreQwen3VLInfo(ScoreQwen3VLInfoMixin, Qwen3VLProcessingInfo):
    """Dense."""


class ScoreQwen3VLMoeInfo(ScoreQwen3VLInfoMixin, Qwen3VLMoeProcessingInfo):
    """Mixture of experts."""


class ScoreQwen3VLProcessor(CompressionProcessorMixin, Qwen3VLMultiModalProcessor):
    """Timestamped cells, each a position grid of its own."""

    # vLLM enlarges this family's table only for its own pruning.
    rotary_table_factor = 1

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """From patch grids and the timestamps of the cells."""
        merge_size = self.info.get_hf_config().vision_config.spatial_merge_size
        pairs = zip(data.get("video_grid_thw", ()), data.get("timestamps", ()), strict=True)
        return [self.info.video_layout(grid_of(thw, merge_size), stamps) for thw, stamps in pairs]


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen3VLProcessor, info=ScoreQwen3VLInfo, dummy_inputs=ScoreQwen3VLDummyInputsBuilder
)
class ScoreQwen3VLForConditionalGeneration(QwenModelMixin, Qwen3VLForConditionalGeneration):
    """Dense Qwen3-VL; Cosmos-Reason2 is the same architecture."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)

    @property
    def row_width(self) -> int:
        """D (1 + deepstack levels)."""
        return int(self.visual_dim + self.multiscale_dim)


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen3VLProcessor, info=ScoreQwen3VLMoeInfo, dummy_inputs=ScoreQwen3VLDummyInputsBuilder
)
class ScoreQwen3VLMoeForConditionalGeneration(ScoreQwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration):
    """Mixture of experts."""
