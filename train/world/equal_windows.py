"""Vision attention over windows of one size as one batched call, where transformers calls once per window."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def batch_equal_windows(tower: Any) -> None:
    """Make a Qwen2.5-VL vision tower attend to equally long windows in one call; others go the usual way.

    Args:
        tower: transformers' Qwen2.5-VL vision model; changed in place, the result is the same to rounding.
    """
    for block in tower.blocks:
        attention = block.attn
        if not hasattr(attention, "one_by_one"):
            attention.one_by_one = attention.forward
            attention.forward = types.MethodType(_forward, attention)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **others: Any,
) -> torch.Tensor:
    lengths = cu_seqlens.diff()
    length = int(lengths[0])
    if not bool((lengths == length).all()):
        return self.one_by_one(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **others)
    count = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)

    def windows(x: torch.Tensor) -> torch.Tensor:
        return x.view(count // length, length, self.num_heads, -1).transpose(1, 2)

    mixed = scaled_dot_product_attention(windows(query), windows(key), windows(value), scale=self.scaling)
    return self.proj(mixed.transpose(1, 2).reshape(count, -1))
