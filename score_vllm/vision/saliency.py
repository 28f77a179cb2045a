"""Per-token saliency from the vision tower's last full attention, for the methods that rank by it.

As FastVID (arXiv 2503.11187) takes it for Qwen2.5-VL: per head, the mean query of a frame against the mean key of
each merge unit, softmax over the frame's units, mean over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from score_vllm.types import VideoGrid
from score_vllm.vision.internvl import merge_size, units
from score_vllm.vision.pooling import pool_frames


def frame_saliency(query: torch.Tensor, key: torch.Tensor, num_frames: int, merge_unit: int) -> torch.Tensor:
    """Mean-query attention over merge units, summed over heads.

    Args:
        query: [T * N * U, H, d] after the rotary embedding; the U patches of a unit are neighbours, units of a frame
            stand together.
        key: the same shape.
        num_frames: T.
        merge_unit: U, patches per token (4 for a 2x2 merge).

    Returns:
        [T, N] float32, summed (not yet averaged) over the H heads.

    Source: FastVID, section on the Qwen2.5-VL variant.
    """
    heads, width = query.shape[-2:]
    mean_query = query.float().view(num_frames, -1, heads, width).mean(1)  # [T, H, d]
    units = key.float().view(num_frames, -1, merge_unit, heads, width).mean(2)  # [T, N, H, d]
    logits = torch.einsum("thd,tnhd->thn", mean_query, units) * width**-0.5
    return logits.softmax(-1).sum(1)


# Logits held at once, in fp32.
_PATCH_LOGITS = 2**24


def patch_saliency(query: torch.Tensor, key: torch.Tensor, num_frames: int, merge_unit: int) -> torch.Tensor:
    """Attention that each token gets from all patches of its frame, summed over heads; computed in chunks of queries.

    Args:
        query, key, num_frames, merge_unit: as of :func:`frame_saliency`.

    Returns:
        [T, N] float32, summed (not yet averaged) over the H heads: per frame the mean over queries of the softmax over
        its patches, then the mean over a unit's patches.

    Source: FlashVID's code for Qwen2.5-VL.
    """
    heads, width = query.shape[-2:]
    queries = query.view(num_frames, -1, heads, width).transpose(1, 2)  # [T, H, P, d]
    keys = key.view(num_frames, -1, heads, width).transpose(1, 2)
    patches = queries.shape[2]
    step = max(1, _PATCH_LOGITS // (heads * patches))
    out = torch.zeros(num_frames, patches, dtype=torch.float32, device=query.device)
    for t in range(num_frames):
        frame_keys = keys[t].float().transpose(1, 2) * width**-0.5
        for start in range(0, patches, step):
            logits = queries[t, :, start : start + step].float() @ frame_keys
            out[t] += logits.softmax(-1).sum(dim=(0, 1))
    return (out / patches).view(num_frames, -1, merge_unit).mean(-1)


# "frame": attention of a frame's mean query over its merge units (FastVID for Qwen2.5-VL).
# "patch": attention that each patch gets from all patches of its frame (FlashVID for Qwen).
KINDS = {"frame": frame_saliency, "patch": patch_saliency}
SALIENCY_KINDS = tuple(KINDS)


class TowerSaliency:
    """Listens to the last full-attention block of one of transformers' Qwen towers.

    Args:
        tower: the model's ``visual``; hooks are added. Qwen2.5-VL's alone has blocks that attend within windows.
    """

    def __init__(self, tower: Any) -> None:
        self._heads: int = tower.config.num_heads
        self._merge_unit: int = tower.config.spatial_merge_size**2
        self._tower = tower
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._windowed = hasattr(tower.config, "fullatt_block_indexes")
        last = max(tower.config.fullatt_block_indexes) if self._windowed else len(tower.blocks) - 1
        attention = tower.blocks[last].attn
        attention.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        hidden = args[0] if args else kwargs["hidden_states"]
        qkv = attention.qkv(hidden).reshape(hidden.shape[0], 3, self._heads, -1)
        self._captured = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *kwargs["position_embeddings"])

    def take(self, patch_grid: torch.Tensor, grid: VideoGrid, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """Saliency of the video that the tower has just seen.

        Args:
            patch_grid: [1, 3] int64, its t, h, w in patches.
            grid: its token grid.
            kinds: out of :data:`KINDS`.

        Returns:
            [T, N] float32 of each kind, in the order of the merger's output.
        """
        from transformers.vision_utils import get_vision_window_index

        assert self._captured is not None, "the tower has not run"
        query, key = self._captured
        self._captured = None
        summed = {kind: KINDS[kind](query, key, grid.t, self._merge_unit) / self._heads for kind in kinds}
        if not self._windowed:
            return summed
        config = self._tower.config
        window_index, _ = get_vision_window_index(
            patch_grid, config.spatial_merge_size, config.window_size, config.patch_size
        )
        order, shape = window_index.argsort(), (grid.t, grid.tokens_per_frame)
        return {kind: mean.flatten()[order].view(shape) for kind, mean in summed.items()}


class SiglipSaliency:
    """Listens to the last used layer of transformers' SigLIP tower (LLaVA-OneVision, LLaVA-Video).

    Args:
        tower: the model's ``vision_tower``; hooks are added.
        config: the model's.
    """

    def __init__(self, tower: Any, config: Any) -> None:
        self._config = config
        self._heads: int = config.vision_config.num_attention_heads
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        layers = getattr(tower, "vision_model", tower).encoder.layers
        # hidden_states[i] comes out of layer i - 1.
        layers[range(len(layers) + 1)[config.vision_feature_layer] - 1].self_attn.register_forward_pre_hook(
            self._keep, with_kwargs=True
        )

    def _keep(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._captured = attention.q_proj(hidden), attention.k_proj(hidden)

    def take(self, patch_grid: torch.Tensor, grid: VideoGrid, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """Saliency of the frames that the tower has just seen, pooled like their features: [T, N] of each kind."""
        assert self._captured is not None, "the tower has not run"
        query, key = (tensor.reshape(-1, self._heads, tensor.shape[-1] // self._heads) for tensor in self._captured)
        self._captured = None
        patches = {kind: KINDS[kind](query, key, grid.t, 1) / self._heads for kind in kinds}
        return {kind: pool_frames(self._config, mean[..., None])[..., 0] for kind, mean in patches.items()}


class InternVLSaliency:
    """Listens to the last layer of transformers' InternViT; its class token is left out.

    Args:
        tower: the model's ``vision_tower``; hooks are added.
        config: the model's.
    """

    def __init__(self, tower: Any, config: Any) -> None:
        self._config = config
        self._heads: int = config.vision_config.num_attention_heads
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        tower.encoder.layer[-1].attention.register_forward_pre_hook(self._keep)

    def _keep(self, attention: Any, args: tuple[Any, ...]) -> None:
        self._captured = attention.q_norm(attention.q_proj(args[0])), attention.k_norm(attention.k_proj(args[0]))

    def take(self, patch_grid: torch.Tensor, grid: VideoGrid, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """Saliency of the frames that the tower has just seen: [T, N] of each kind."""
        assert self._captured is not None, "the tower has not run"
        query, key = (units(tensor.unflatten(-1, (self._heads, -1)), self._config) for tensor in self._captured)
        self._captured = None
        merge_unit = merge_size(self._config) ** 2
        return {kind: KINDS[kind](query, key, grid.t, merge_unit) / self._heads for kind in kinds}
