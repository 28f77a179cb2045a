"""The frozen language model, run only as far as the answer needs it.

All layers but the last read whole sequences. In the last one nothing but the answer's rows is used, so queries,
output projection and MLP are computed for these alone: a fifth of the work of a 4-layer model, a thirtieth of 28.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.train.schema import ConfigurationError

ATTENTION = ("sdpa", "flash_attention_2")
# Text models whose last layer is run for the answer's rows alone: plain attention, rotated over the whole head. Others
# (Qwen3.5: gated attention, part of a head rotated) run it whole, which costs one layer's share.
PLAIN = ("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")


def check_decoder(language_model: Any) -> None:
    """See that attention without a mask argument is plainly causal in this model.

    Raises:
        ValueError: another attention implementation, or sliding windows.
    """
    chosen = language_model.config._attn_implementation
    if chosen not in ATTENTION:
        raise ConfigurationError(f"attn_implementation must be one of {list(ATTENTION)}, got {chosen!r}")
    if getattr(language_model, "has_sliding_layers", False):
        raise ConfigurationError("the model has sliding-window attention, which training does not support")


def answer_states(
    language_model: Any,
    rows: torch.Tensor,
    positions: torch.Tensor,
    answers: torch.Tensor,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final hidden states at some places of right-padded sequences.

    Attention is causal, so that padding on the right reaches no real token and needs no mask.

    Args:
        language_model: a text model, see :func:`check_decoder`. Its layers are called one by one, past the code of
            transformers that would take gaps in 1-D positions for packed sequences. Layers without attention (gated
            delta nets) are causal too.
        rows: [B, L, D] input embeddings.
        positions: [3, B, L] int64; of a model with 1-D positions all axes are the same.
        answers: [B, M] int64 indices into L.
        levels: [levels, B, L, D] deepstack rows, added after as many first layers; zero where there is no vision.

    Returns:
        [B, M, D] after the final norm.
    """
    rope = language_model.config.rope_parameters
    axes = positions if "mrope_section" in rope else positions[0]
    cos, sin = language_model.rotary_emb(rows, axes)  # [B, L, head_dim] each
    *layers, last = language_model.layers
    hidden = rows
    for number, layer in enumerate(layers):
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        if levels is not None and number < len(levels):
            hidden = hidden + levels[number]

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, answers[..., None].expand(-1, -1, values.shape[-1]))

    if language_model.config.model_type not in PLAIN:
        whole = last(hidden, attention_mask=None, position_embeddings=(cos, sin))
        states: torch.Tensor = language_model.norm(pick(whole))
        return states
    attention = last.self_attn
    normed = last.input_layernorm(hidden)
    residual = pick(hidden)
    q = _heads(attention.q_proj(pick(normed)), attention.head_dim)  # [B, H, M, d]
    k = _heads(attention.k_proj(normed), attention.head_dim)  # [B, H_kv, L, d]
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = _rotate(q, pick(cos), pick(sin)), _rotate(k, cos, sin)
    v = _heads(attention.v_proj(normed), attention.head_dim)
    groups = attention.num_key_value_groups
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    seen = torch.arange(rows.shape[1], device=rows.device) <= answers[..., None]  # [B, M, L]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=attention.scaling)
    hidden = residual + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    out: torch.Tensor = language_model.norm(hidden)
    return out


def _heads(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[B, L, H * d] to [B, H, L, d]."""
    return values.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, H, L, d] by [B, L, d]."""
    first, second = values.chunk(2, dim=-1)
    return values * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
