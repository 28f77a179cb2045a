"""What the Qwen families share: patch grids, and towers that take the patches of all videos in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from score_vllm.layout import VideoLayout, grid_layout
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.saliency import AttentionSaliency, check_saliency_config
from score_vllm.types import VideoGrid


def grid_of(grid_thw: torch.Tensor, merge_size: int) -> VideoGrid:
    """Token grid after the merger, from a [3] patch grid."""
    t, h, w = (int(value) for value in grid_thw)
    return VideoGrid(t, h // merge_size, w // merge_size)


class QwenModelMixin(CompressionModelMixin):
    """Put before a Qwen model class, whose tower is ``self.visual``."""

    visual: Any

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """An image is a grid of one cell."""
        return grid_layout(grid_of(data["image_grid_thw"].data, self.visual.spatial_merge_size), 1.0)

    def get_encoder_cudagraph_config(self) -> Any:
        """Videos leave the encoder's graphs: selection follows the tower and its output has other columns."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        if self.compressor is not None:
            config.modalities = [name for name in config.modalities if name != "video"]
        return config

    def _setup_compression(self, vllm_config: Any) -> None:
        super()._setup_compression(vllm_config)
        self._saliency: AttentionSaliency | None = None
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self._saliency = AttentionSaliency(self.visual)

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        video_input = super()._parse_and_validate_video_input(**kwargs)  # type: ignore[misc]
        return video_input if self.compressor is None or video_input is None else (video_input, kwargs)

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        """Rows of each video, encoded and selected one video at a time."""
        if self.compressor is None:
            return super()._process_video_input(video_input)  # type: ignore[misc]
        inputs, fields = video_input
        return self.compress_videos(fields, self._encode_videos(inputs, self.saliency_kinds(fields)))

    def _encode_videos(
        self, inputs: Mapping[str, Any], ranked: list[str | None]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        merge_size = self.visual.spatial_merge_size
        kind = inputs["type"]
        # Pixels come as one row per patch, precomputed embeddings as one per merged token.
        rows_per_patch = 1 if kind == "pixel_values_videos" else merge_size**2
        start = 0
        for thw, ranked_by in zip(inputs["video_grid_thw"], ranked, strict=True):
            stop = start + int(thw.prod()) // rows_per_patch
            one = {"type": kind, kind: inputs[kind][start:stop], "video_grid_thw": thw[None]}
            listener = self._saliency if ranked_by and kind == "pixel_values_videos" else None
            with nullcontext() if listener is None else listener.listen():
                (x,) = super()._process_video_input(one)  # type: ignore[misc]
            saliency = None
            if listener is not None and ranked_by is not None:
                saliency = listener.take(thw.tolist(), grid_of(thw, merge_size), ranked_by)
            yield x, saliency
            start = stop
