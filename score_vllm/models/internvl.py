"""InternVL3 and InternVL3.5 in transformers' format with compressed videos.

The span of a video is, per frame, ``Frame1: <img>``, its vision rows, ``</img>``; a frame is 448 x 448 pixels and 256
rows, whatever the file's size. Positions are 1-D: :mod:`score_vllm.models.sequential`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

from score_vllm.layout import VideoLayout, sequential_layout
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.admission import AdmissionDummyInputsMixin, AdmissionInfoMixin, VideoLimit
from score_vllm.models.cells import ROWS
from score_vllm.models.processing import CompressionProcessorMixin
from score_vllm.models.saliency import check_saliency_config
from score_vllm.types import VideoGrid
from score_vllm.vision.cell_cache import device_index
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
class ScoreInternVLForConditionalGeneration(CompressionModelMixin, InternS1ForConditionalGeneration, SupportsMRoPE):
    """InternVL whose videos enter the language model as S + K rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._listening = False
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self._attention = self.vision_tower.encoder.layer[-1].attention
            self._attention.attn.register_forward_pre_hook(self._keep)

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """An image is a run of tokens."""
        return sequential_layout(VideoGrid(1, 1, length), [[]], [[]])

    def _keep(self, module: Any, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._captured = args[0], args[1]

    def _saliency(self, kind: str) -> torch.Tensor:
        """[T, N] of the frames that the tower has just seen; every rank holds all heads of this tower."""
        assert self._captured is not None, "the tower has not run"
        heads, captured = self._attention.num_heads, self._captured
        self._captured = None
        query, key = (units(tensor.unflatten(-1, (heads, -1)), self.config) for tensor in captured)
        return KINDS[kind](query, key, len(captured[0]), merge_size(self.config) ** 2) / heads

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        video_input = super()._parse_and_validate_video_input(**kwargs)
        return video_input if self.compressor is None or video_input is None else (video_input, kwargs)

    def _process_vision_input(self, image_input: Any) -> Any:
        """Rows of each image, or of each video, encoded and selected one video at a time."""
        if not isinstance(image_input, tuple):
            return super()._process_vision_input(image_input)
        videos, fields = image_input
        frames = videos["pixel_values"].split([int(count) for count in videos["num_patches"]])
        return self.compress_videos(fields, self._encode_videos(frames, fields))

    def _encode_videos(
        self, videos: Any, fields: Mapping[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for index, (pixels, kind) in enumerate(zip(videos, self.saliency_kinds(fields), strict=True)):
            yield self.encode_cells(fields, index, kind, partial(self._encode_some, pixels, kind))

    def _encode_some(self, pixels: torch.Tensor, kind: str | None, frames: list[int]) -> dict[str, torch.Tensor]:
        """The tower on some frames [F, ...] of a video; each is a cell."""
        self._listening = kind is not None
        if len(frames) < len(pixels):
            pixels = pixels.index_select(0, device_index(frames, pixels.device))
        values = {ROWS: self.extract_feature(pixels)}
        self._listening = False
        if kind is not None:
            values[kind] = self._saliency(kind)
        return values
