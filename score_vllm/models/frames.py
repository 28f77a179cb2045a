"""What LLaVA and InternVL share: a tower that encodes frames one by one, and positions in one dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from score_vllm.layout import VideoLayout, sequential_layout
from score_vllm.models.adapter import CompressionModelMixin
from score_vllm.models.cells import ROWS
from score_vllm.models.saliency import check_saliency_config
from score_vllm.types import VideoGrid
from score_vllm.vision.cell_cache import device_index


class FrameModelMixin(CompressionModelMixin):
    """Put before a model class; a frame is a cell.

    A family says which attention is the tower's last (``last_attention``), what its frames become (``frame_rows``), and
    what that attention's captured query and key say (``frame_saliency``).
    """

    def _setup_compression(self, vllm_config: Any) -> None:
        super()._setup_compression(vllm_config)
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._listening = False
        if self.compressor is not None and self.compressor.needs_saliency:
            check_saliency_config(vllm_config)
            self.last_attention.attn.register_forward_pre_hook(self._keep)

    @property
    def last_attention(self) -> Any:
        """Of the tower; its ``attn`` gets query and key."""
        raise NotImplementedError

    def frame_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """[F, N, D] of frames [F, ...]."""
        raise NotImplementedError

    def frame_saliency(self, kind: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[F, N] of the frames that the tower has just seen."""
        raise NotImplementedError

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """An image is a run of tokens."""
        return sequential_layout(VideoGrid(1, 1, length), [[]], [[]])

    def _keep(self, module: Any, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._captured = args[0], args[1]

    def _encode_videos(
        self, videos: Any, fields: Mapping[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for index, (pixels, kind) in enumerate(zip(videos, self.saliency_kinds(fields), strict=True)):
            yield self.encode_cells(fields, index, kind, partial(self._encode_some, pixels, kind))

    def _encode_some(self, pixels: torch.Tensor, kind: str | None, frames: list[int]) -> dict[str, torch.Tensor]:
        """The tower on some frames [F, ...] of a video."""
        self._listening = kind is not None
        if len(frames) < len(pixels):
            pixels = pixels.index_select(0, device_index(frames, pixels.device))
        values = {ROWS: self.frame_rows(pixels)}
        self._listening = False
        if kind is not None:
            assert self._captured is not None, "the tower has not run"
            captured, self._captured = self._captured, None
            values[kind] = self.frame_saliency(kind, *captured)
        return values
