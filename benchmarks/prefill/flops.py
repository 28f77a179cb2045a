"""How much arithmetic a prefill is, from the model's shape alone; no model is built.

With L tokens, a decoder layer of width D, H query and G key/value heads of width d, and an MLP of width I does

    projections   2 L (D H d  +  2 D G d  +  H d D  +  3 D I)
    attention     4 H d L (L + 1) / 2          q k^T and p v over the causal half, diagonal included

floating-point operations (a multiply and an add are two), and the head adds 2 D V for the one row that becomes the
first token. Norms, rotary embeddings and activations are left out: they are linear in L and small.

In Qwen3.5 three of four layers are gated delta nets: with a key heads of width p and b value heads of width q, such a
layer projects with D (2 a p + 3 b q + 2 b) weights beside the MLP's, and reads and writes its state three times a token
(3 b p q multiply-adds); no term grows with L squared. Its attention layers have a gate as wide as the queries.

The *FLOP bound* of a shorter prompt is FLOPs(whole) / FLOPs(shorter): the speed-up at an equal rate of arithmetic.
It is no law of nature: where the machine does attention at a lower rate than matrix products, the whole prompt, which
is mostly attention, is slowed more, and a measured ratio may lie above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DeltaNetShape:
    """Sizes of the gated delta nets that take the place of attention in ``num_layers`` layers."""

    num_layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def per_token(self, width: int) -> int:
        """Multiply-adds of one layer and token, without the MLP."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return width * (2 * keys + 3 * values + 2 * self.value_heads) + 3 * values * self.key_dim


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a dense decoder, named as in Hugging Face configs.

    Attributes:
        hidden_size: D.
        intermediate_size: I, width of the gated MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: H.
        num_key_value_heads: G.
        head_dim: d.
        vocab_size: V.
        delta_net: of a hybrid; its layers are among ``num_hidden_layers``.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    delta_net: DeltaNetShape | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TextShape:
        """Read a model's ``config.json``: the entry ``text_config``, or the file itself where it is flat.

        Raises:
            ValueError: a size is missing, or the model is a mixture of experts, whose layers do other work.
        """
        text = {**config, **(config.get("text_config") or {})}
        if any(text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError("FLOPs are counted for dense models only; this config has experts")
        sizes = {name: text.get(name) for name in _SIZES}
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        if sizes["head_dim"] is None and sizes["hidden_size"] and sizes["num_attention_heads"]:
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        if missing := sorted(name for name, value in sizes.items() if value is None):
            raise ValueError(f"the model's config lacks {missing}")
        return cls(**sizes, delta_net=_delta_net(text))


_SIZES = tuple(name for name in TextShape.__slots__ if name != "delta_net")


def _delta_net(text: dict[str, Any]) -> DeltaNetShape | None:
    if "linear_num_value_heads" not in text:
        return None
    layers = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")
    linear = layers - layers // int(text.get("full_attention_interval", 4))
    if kinds is not None:
        linear = sum(kind == "linear_attention" for kind in kinds)
    heads = (text[f"linear_num_{kind}_heads"] for kind in ("key", "value"))
    return DeltaNetShape(linear, *heads, *(text[f"linear_{kind}_head_dim"] for kind in ("key", "value")))


def prefill_flops(shape: TextShape, num_tokens: int) -> int:
    """FLOPs of one causal prefill of ``num_tokens`` tokens, up to the logits of the last; formula above.

    Raises:
        ValueError: ``num_tokens`` is below 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be >= 1, got {num_tokens}")
    d_model, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    mlp, delta = 3 * d_model * shape.intermediate_size, shape.delta_net
    weights = d_model * query + 2 * d_model * key_value + query * d_model + mlp
    if delta is not None:
        weights += d_model * query
    attention = 4 * query * (num_tokens * (num_tokens + 1) // 2)
    layer = 2 * num_tokens * weights + attention
    linear = 0 if delta is None else 2 * num_tokens * (delta.per_token(d_model) + mlp)
    count = 0 if delta is None else delta.num_layers
    return (shape.num_hidden_layers - count) * layer + count * linear + 2 * d_model * shape.vocab_size


def flop_bound(shape: TextShape, whole: int, shorter: int) -> float:
    """Speed-up of a prompt of ``shorter`` tokens over one of ``whole`` tokens at an equal rate of arithmetic.

    Raises:
        ValueError: not 1 <= shorter <= whole.
    """
    if not 1 <= shorter <= whole:
        raise ValueError(f"tokens must be in [1, {whole}], got {shorter}")
    return prefill_flops(shape, whole) / prefill_flops(shape, shorter)
