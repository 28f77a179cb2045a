"""Per-token saliency from the vision tower's last full attention, for the methods that rank by it.

See :mod:`score_vllm.vision.saliency` for what it is. vLLM's tower returns no attention: a hook keeps the queries
and keys of one block after rotation. It is installed only where a served method needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce

from score_vllm.types import VideoGrid
from score_vllm.vision.saliency import KINDS


def check_saliency_config(config: Any) -> None:
    """:func:`check_saliency_options` of vLLM's configuration."""
    check_saliency_options(config.model_config.get_multimodal_config().mm_encoder_tp_mode, config.compilation_config)


def check_saliency_options(tower_mode: str, compilation: Any) -> None:
    """Refuse set-ups in which the hook would not see every query and key.

    Args:
        tower_mode: ``--mm-encoder-tp-mode``.
        compilation: ``--compilation-config``.

    Raises:
        ValueError: one sentence that names the option.
    """
    if tower_mode == "data":
        raise ValueError(
            "methods that rank by attention do not support --mm-encoder-tp-mode data: "
            "each rank sees some of the videos only; use the mode 'weights' or another method"
        )
    if getattr(compilation, "compile_mm_encoder", False):
        raise ValueError(
            "methods that rank by attention do not support compile_mm_encoder: a compiled tower does not call the hook"
        )


class AttentionSaliency:
    """Listens to the last full-attention block of a Qwen tower.

    Args:
        visual: vLLM's; Qwen2.5-VL's alone has blocks that attend within windows.
    """

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._listening = False
        self._windowed = hasattr(visual, "fullatt_block_indexes")
        last = max(visual.fullatt_block_indexes) if self._windowed else len(visual.blocks) - 1
        attention = visual.blocks[last].attn
        self._total_heads = attention.num_attention_heads_per_partition * attention.tp_size
        self._parallel = attention.tp_size > 1
        attention.attn.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening:
            # [1, S, H, d] each; the tower runs on one video at a time.
            self._captured = kwargs["query"][0], kwargs["key"][0]

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Run the tower on one video inside; images, and methods that rank by something else, stay outside."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def take(self, patch_grid: list[int], grid: VideoGrid, kind: str) -> torch.Tensor:
        """Saliency of the video that the tower has just seen.

        Args:
            patch_grid: its [t, h, w] in patches.
            grid: its token grid.
            kind: of saliency, out of :data:`score_vllm.vision.saliency.KINDS`.

        Returns:
            [T, N] float32, in the order of the merger's output.
        """
        assert self._captured is not None, "the tower has not run"
        query, key = self._captured
        self._captured = None
        summed = KINDS[kind](query, key, grid.t, self._visual.spatial_merge_size**2)
        if self._parallel:
            summed = tensor_model_parallel_all_reduce(summed)
        mean = summed / self._total_heads
        if not self._windowed:
            return mean
        # The tower works in window order; the same indices that restore its output restore this.
        order = self._visual.prepare_encoder_metadata([patch_grid])["reverse_indices"].to(mean.device)
        return mean.flatten()[order].view(grid.t, grid.tokens_per_frame)
