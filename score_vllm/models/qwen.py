"""What the Qwen families share: patch grids, and towers that take the patches of all videos in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from score_vllm.layout import VideoLayout, grid_layout
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.cells import ROWS
from score_vllm.models.encoder_graphs import EncoderGraphsMixin
from score_vllm.models.saliency import AttentionSaliency, check_saliency_config
from score_vllm.types import VideoGrid
from score_vllm.vision.cell_cache import device_index


def grid_of(grid_thw: torch.Tensor, merge_size: int) -> VideoGrid:
    """Token grid after the merger, from a [3] patch grid."""
    t, h, w = (int(value) for value in grid_thw)
    return VideoGrid(t, h // merge_size, w // merge_size)


class QwenModelMixin(CompressionModelMixin, EncoderGraphsMixin):
    """Put before a Qwen model class, whose tower is ``self.visual``."""

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """An image is a grid of one cell."""
        return grid_layout(grid_of(data["image_grid_thw"].data, self.visual.spatial_merge_size), 1.0)

    @property
    def requires_sequential_video_encoding(self) -> bool:  # type: ignore[override]
        """Read by vLLM's V1 runner, which asks only whether it is there: it would take the videos of a batch apart, and
        not to the graphs. Without graphs they are encoded one by one in any case."""
        if self.graphs_take_videos and self._graphs_wanted:
            raise AttributeError("a batch of videos goes to the encoder's graphs")
        return True

    def _setup_compression(self, vllm_config: Any) -> None:
        super()._setup_compression(vllm_config)
        self._graphs_wanted = bool(getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False))
        self._saliency: AttentionSaliency | None = None
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self._saliency = AttentionSaliency(self.visual)

    def _process_video_input(self, video_input: Any) -> tuple[torch.Tensor, ...]:
        """Rows of each video, encoded and selected one video at a time."""
        if self.compressor is None:
            return super()._process_video_input(video_input)  # type: ignore[misc]
        inputs, fields = video_input
        return self.compress_videos(fields, self._encode_videos(inputs, fields))

    def _encode_videos(
        self, inputs: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        kind = inputs["type"]
        # Pixels come as one row per patch, precomputed embeddings as one per merged token.
        rows_per_patch = 1 if kind == "pixel_values_videos" else self.visual.spatial_merge_size**2
        start = 0
        for index, (thw, ranked_by) in enumerate(
            zip(inputs["video_grid_thw"], self.saliency_kinds(fields), strict=True)
        ):
            stop = start + int(thw.prod()) // rows_per_patch
            values = inputs[kind][start:stop]
            start = stop
            if kind != "pixel_values_videos":
                (x,) = super()._process_video_input({"type": kind, kind: values, "video_grid_thw": thw[None]})  # type: ignore[misc]
                yield x, None
            else:
                yield self.encode_cells(fields, index, ranked_by, partial(self._encode_some, values, thw, ranked_by))

    def _encode_some(
        self, pixels: torch.Tensor, thw: torch.Tensor, ranked_by: str | None, cells: list[int]
    ) -> dict[str, torch.Tensor]:
        """The tower on some cells of a video, whose frames attend to nothing outside of their cell.

        Args:
            pixels: [T * h * w, ...], of the whole video.
            thw: its [T, h, w] in patches.
            ranked_by: kind of saliency, or None.
            cells: which ones.
        """
        t, h, w = (int(value) for value in thw)
        if len(cells) < t:
            pixels = pixels.view(t, h * w, -1).index_select(0, device_index(cells, pixels.device)).flatten(0, 1)
        # With the encoder in data-parallel mode every rank takes whole items: let an item be a cell.
        grid = [[1, h, w]] * len(cells) if self.use_data_parallel else [[len(cells), h, w]]
        inputs = {"type": "pixel_values_videos", "pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grid)}
        listener = None if ranked_by is None else self._saliency
        with nullcontext() if listener is None else listener.listen():
            items = super()._process_video_input(inputs)  # type: ignore[misc]
        rows = items[0] if len(items) == 1 else torch.cat(items)
        values = {ROWS: rows.view(len(cells), -1, rows.shape[-1])}
        if listener is not None and ranked_by is not None:
            grid_of_cells = grid_of(torch.tensor([len(cells), h, w]), self.visual.spatial_merge_size)
            values[ranked_by] = listener.take([len(cells), h, w], grid_of_cells, ranked_by)
        return values
