"""Visual tokens of a video through transformers: what serving sees, without vLLM. For pictures and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from score_vllm.types import VideoGrid
from score_vllm.video import Resize
from score_vllm.vision.saliency import TowerSaliency


class VisionTower:
    """Frozen processor and vision tower of a Qwen2.5-VL checkpoint.

    Args:
        model: directory or hub id.
        device: of the tower.
        dtype: of the tower.
        loaded: the whole model where the caller has it already, on that device and in that dtype; else it is
            read from ``model``.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: it is not a Qwen2.5-VL.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        loaded: Any = None,
    ) -> None:
        from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

        config = AutoConfig.from_pretrained(model)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"model {str(model)!r} is a {config.model_type}; supported: qwen2_5_vl")
        self.processor: Any = AutoProcessor.from_pretrained(model).video_processor
        whole = loaded or Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
        self.tower: Any = whole.model.visual.eval().to(device)
        # For decode_video: frames of the size that the processor would make of them.
        self.resize = Resize.for_processor(self.processor)
        self.hidden_size: int = config.get_text_config().hidden_size
        self._device = device
        self._dtype = dtype
        self._merge = config.vision_config.spatial_merge_size
        self._saliency: TowerSaliency | None = None

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid]:
        """Tokens of one video.

        Args:
            frames: [F, H, W, 3] uint8 RGB, F >= 1; an odd last frame is merged with a copy of itself.

        Returns:
            ``(x, grid)``: x is [T, N, D] in the tower's dtype.

        Raises:
            ValueError: the frames have another shape or dtype.
        """
        x, grid, _ = self._encode(frames)
        return x, grid

    @torch.no_grad()
    def encode_with_saliency(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid, torch.Tensor]:
        """:meth:`encode`, and the attention that ``fastvid`` and ``holitom`` rank by.

        Args:
            frames: [F, H, W, 3] uint8 RGB, F >= 1.

        Returns:
            ``(x, grid, saliency)``: x is [T, N, D] in the tower's dtype, saliency [T, N] float32.

        Raises:
            ValueError: the frames have another shape or dtype.
        """
        if self._saliency is None:
            self._saliency = TowerSaliency(self.tower)
        x, grid, patch_grid = self._encode(frames)
        return x, grid, self._saliency.take(patch_grid, grid)

    def _encode(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid, torch.Tensor]:
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames must be non-empty [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
        if self.resize is not None:
            self.resize.size(*frames.shape[:3])  # a shape that the processor refuses, in one sentence
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        inputs = self.processor([video], return_tensors="pt")
        thw = inputs["video_grid_thw"]
        pixels = inputs["pixel_values_videos"].to(self._device, self._dtype)
        out = self.tower(pixels, grid_thw=thw.to(self._device))
        t, h, w = (int(value) for value in thw[0])
        grid = VideoGrid(t, h // self._merge, w // self._merge)
        return out.pooler_output.view(grid.t, grid.tokens_per_frame, -1), grid, thw
