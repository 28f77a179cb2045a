"""Qwen2.5-VL with compressed videos. Registered in the place of vLLM's own class by the plug-in."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from score_vllm.models import video_loaders  # noqa: F401  (registers the loaders where requests are processed)
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.processing import METHOD_INDEX_KEY, NUM_RETAINED_KEY, CompressionProcessorMixin, grid_of
from score_vllm.models.saliency import AttentionSaliency, check_saliency_config


class ScoreQwen2_5_VLProcessor(CompressionProcessorMixin, Qwen2_5_VLMultiModalProcessor):
    """Writes K placeholders per video; see the adapter."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._setup_compression(info.get_hf_processor().video_token)


@MULTIMODAL_REGISTRY.register_processor(
    ScoreQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class ScoreQwen2_5_VLForConditionalGeneration(CompressionModelMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose videos enter the language model as K rows at their original positions."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup_compression(vllm_config)
        self._saliency: AttentionSaliency | None = None
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self._saliency = AttentionSaliency(self.visual)

    def get_encoder_cudagraph_config(self) -> Any:
        """Videos leave the encoder's graphs: selection follows the tower and its output has other columns."""
        config = super().get_encoder_cudagraph_config()
        if self.compressor is not None:
            config.modalities = [name for name in config.modalities if name != "video"]
        return config

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        video_input = super()._parse_and_validate_video_input(**kwargs)
        if self.compressor is None or video_input is None:
            return video_input
        return video_input, kwargs[NUM_RETAINED_KEY], kwargs[METHOD_INDEX_KEY]

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        """[K_i, D + 9] rows of each video, encoded and selected one video at a time."""
        if self.compressor is None:
            return super()._process_video_input(video_input)
        inputs, num_retained, method_index = video_input
        merge_size = self.visual.spatial_merge_size
        tokens_per_second = float(self.config.vision_config.tokens_per_second)
        grids = inputs["video_grid_thw"]
        seconds = inputs.get("second_per_grid_ts")
        kind = inputs["type"]
        # Pixels come as one row per patch, precomputed embeddings as one per merged token.
        rows_per_patch = 1 if kind == "pixel_values_videos" else merge_size**2
        outputs, start = [], 0
        for index, thw in enumerate(grids):
            stop = start + int(thw.prod()) // rows_per_patch
            one = {"type": kind, kind: inputs[kind][start:stop], "video_grid_thw": grids[index : index + 1]}
            (x,) = super()._process_video_input(one)
            grid = grid_of(thw, merge_size)
            t_factor = (1.0 if seconds is None else float(seconds[index])) * tokens_per_second
            kept, method = int(num_retained[index]), self.compressor.serving.methods[int(method_index[index])]
            saliency = None
            if self._saliency is not None and kind == "pixel_values_videos":
                saliency = self._saliency.take(thw.tolist(), grid)
            outputs.append(self.compressor.compress(x, grid, t_factor, kept, method, saliency))
            start = stop
        return tuple(outputs)
