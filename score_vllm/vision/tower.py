"""Visual tokens of a video through transformers: what serving sees, without vLLM. For pictures and training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from score_vllm.layout import VideoLayout, grid_layout, timestamped_layout
from score_vllm.types import VideoGrid
from score_vllm.video import Resize
from score_vllm.vision.glm import cell_seconds, glm_layout
from score_vllm.vision.internvl import frame_side, internvl_layout
from score_vllm.vision.pooling import frames_layout, pool_frames
from score_vllm.vision.saliency import SALIENCY_KINDS, InternVLSaliency, SiglipSaliency, TowerSaliency

# transformers' model types whose towers read patches of two frames at a time.
QWEN_TYPES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
GLM_TYPES = ("glm4v", "glm4v_moe")
# And those whose towers read square frames of one size.
LLAVA_TYPES = ("llava_onevision",)
INTERNVL_TYPES = ("internvl",)
MODEL_TYPES = (*QWEN_TYPES, *GLM_TYPES, *LLAVA_TYPES, *INTERNVL_TYPES)
# Each cell stands after its time in words.
TIMESTAMPED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class VisionTower:
    """Frozen processor and vision tower of a checkpoint of any supported family.

    Args:
        model: directory or hub id.
        device: of the tower.
        dtype: of the tower.
        loaded: the whole model where the caller has it already, on that device and in that dtype; else it is
            read from ``model``.

    Attributes:
        hidden_size: D.
        config: the checkpoint's.
        kind: its model type, one of :data:`MODEL_TYPES`.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: it is of another kind.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        loaded: Any = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        config = AutoConfig.from_pretrained(model)
        if config.model_type not in MODEL_TYPES:
            raise ValueError(f"model {str(model)!r} is a {config.model_type}; supported: {', '.join(MODEL_TYPES)}")
        self.config: Any = config
        self.kind: str = config.model_type
        processor: Any = AutoProcessor.from_pretrained(model)
        self.processor: Any = processor.video_processor
        # For decode_video: frames of the size that the processor would make of them.
        self.resize = Resize.for_processor(self.processor)
        self._text_processor: Any = processor
        self._encode_text = partial(processor.tokenizer.encode, add_special_tokens=False)
        whole = loaded or AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        self._core: Any = whole.model
        self.square_frames: bool = self.kind in (*LLAVA_TYPES, *INTERNVL_TYPES)
        self.tower: Any = self._core.vision_tower if self.square_frames else self._core.visual
        self.tower.eval().to(device)
        if self.square_frames:
            self._core.multi_modal_projector.eval().to(device)
        self.hidden_size: int = config.get_text_config().hidden_size
        self._device = device
        self._dtype = dtype
        self._saliency: TowerSaliency | SiglipSaliency | InternVLSaliency | None = None

    def encode(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid]:
        """Tokens of one video, as methods read them.

        Args:
            frames: [F, H, W, 3] uint8 RGB, F >= 1; where cells hold two frames, an odd last one is doubled.

        Returns:
            ``(x, grid)``: x is [T, N, D] in the tower's dtype.

        Raises:
            ValueError: the frames have another shape or dtype.
        """
        rows, grid = self.encode_rows(frames)
        return rows[..., : self.hidden_size], grid

    @torch.no_grad()
    def encode_rows(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid]:
        """Whole rows of one video: :meth:`encode`'s tokens and, behind them, the tower's deepstack levels.

        Returns:
            ``(rows, grid)``: rows is [T, N, D (1 + levels)].
        """
        rows, grid, _ = self._encode(frames)
        return rows, grid

    @torch.no_grad()
    def encode_with_saliency(
        self, frames: np.ndarray, kinds: Sequence[str] = SALIENCY_KINDS
    ) -> tuple[torch.Tensor, VideoGrid, dict[str, torch.Tensor]]:
        """:meth:`encode`, and the attention that some methods rank by.

        Args:
            frames: [F, H, W, 3] uint8 RGB, F >= 1.
            kinds: which kinds of saliency; see :data:`score_vllm.vision.saliency.KINDS`.

        Returns:
            ``(x, grid, saliency)``: x is [T, N, D] in the tower's dtype, saliency [T, N] float32 of each kind.

        Raises:
            ValueError: the frames have another shape or dtype.
        """
        if self._saliency is None:
            if self.kind in INTERNVL_TYPES:
                self._saliency = InternVLSaliency(self.tower, self.config)
            elif self.kind in LLAVA_TYPES:
                self._saliency = SiglipSaliency(self.tower, self.config)
            else:
                self._saliency = TowerSaliency(self.tower)
        rows, grid, patch_grid = self._encode(frames)
        return rows[..., : self.hidden_size], grid, self._saliency.take(patch_grid, grid, kinds)

    def layout(self, grid: VideoGrid, num_frames: int, fps: float, times: Sequence[float] | None = None) -> VideoLayout:
        """The span of a video in the prompt.

        Args:
            grid: of the video.
            num_frames: F, frames given to the tower.
            fps: of those frames.
            times: seconds of each frame; None: evenly, from 0.
        """
        seconds = [frame / fps for frame in range(num_frames)] if times is None else times
        if self.kind in LLAVA_TYPES:
            return frames_layout(self.config, num_frames)
        if self.kind in INTERNVL_TYPES:
            return internvl_layout(num_frames, self._encode_text, self.config, self._text_processor)
        if self.kind in GLM_TYPES:
            return glm_layout(grid, cell_seconds(seconds, grid.t), self._encode_text, self.config, self._text_processor)
        if self.kind not in TIMESTAMPED:
            vision = self.config.vision_config
            per_cell = vision.temporal_patch_size / fps
            return grid_layout(grid, per_cell * vision.tokens_per_second if self.kind == "qwen2_5_vl" else 1.0)
        # A cell stands midway between its frames; an odd last one is doubled.
        pairs = np.asarray(seconds)[np.minimum(np.arange(2 * grid.t), num_frames - 1)].reshape(grid.t, 2)
        markers = self.config.vision_start_token_id, self.config.vision_end_token_id
        return timestamped_layout(grid, pairs.mean(1).tolist(), self._encode_text, *markers)

    def _encode(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid, torch.Tensor]:
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames must be non-empty [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
        if self.resize is not None:
            self.resize.size(*frames.shape[:3])  # a shape that the processor refuses, in one sentence
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if self.square_frames:
            return self._encode_square(video)
        options = {"do_sample_frames": False} if self.kind in (*TIMESTAMPED, *GLM_TYPES) else {}
        inputs = self.processor([video], return_tensors="pt", **options)
        thw = inputs["video_grid_thw"]
        pixels = inputs["pixel_values_videos"].to(self._device, self._dtype)
        # GLM's tower takes each cell as a picture of its own.
        seen = torch.tensor([[1, *thw[0, 1:]]] * int(thw[0, 0])) if self.kind in GLM_TYPES else thw
        out = self.tower(pixels, grid_thw=seen.to(self._device))
        t, h, w = (int(value) for value in thw[0])
        merge = self.config.vision_config.spatial_merge_size
        grid = VideoGrid(t, h // merge, w // merge)
        rows = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1)
        return rows.view(grid.t, grid.tokens_per_frame, -1), grid, thw

    def _encode_square(self, video: torch.Tensor) -> tuple[torch.Tensor, VideoGrid, torch.Tensor]:
        pixels = self.processor([video], return_tensors="pt")["pixel_values_videos"][0].to(self._device, self._dtype)
        if self.kind in INTERNVL_TYPES:
            x, side = self._core.get_image_features(pixels).pooler_output, frame_side(self.config)
            return x, VideoGrid(len(x), side, side), torch.tensor([[len(x), side, side]])
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        features = self._core.multi_modal_projector(hidden[self.config.vision_feature_layer])
        x = pool_frames(self.config, features)
        side = round(x.shape[1] ** 0.5)
        return x, VideoGrid(len(x), side, side), torch.tensor([[len(x), side, side]])
