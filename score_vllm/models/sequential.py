"""1-D positions through vLLM's M-RoPE: three equal axes select the same angles as one.

A runner without M-RoPE counts positions as slots, so text after a compressed video, and every generated token, would
stand too early. With it the runner asks the model for the positions of a prompt and adds the request's delta in decode.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import uses_mrope

from score_vllm.config import ServingConfig

# vLLM builds an M-RoPE layer for these; others would be dropped in silence.
_ROPE_TYPES = ("default", "yarn")
# Language models whose compiled forward takes [3, tokens] positions of any length.
_COMPILED_TYPES = ("qwen2", "qwen3")


class SequentialPositionsConfig(VerifyAndUpdateConfig):
    """Run by vLLM when a model's configuration is made; does nothing without a serving configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Give the language model ``mrope_section``.

        Raises:
            ValueError: its rotary embedding is of a kind for which vLLM has no M-RoPE, or vLLM would compile the
                language model for one length of positions.
        """
        config = model_config.hf_config
        if ServingConfig.from_hf_config(config) is None or uses_mrope(config):
            return
        text = config.get_text_config()
        rope = text.rope_parameters
        kind = rope.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise ValueError(f"SCORE needs a rotary embedding of type {' or '.join(_ROPE_TYPES)}, got {kind!r}")
        if text.model_type not in _COMPILED_TYPES and not model_config.enforce_eager:
            raise ValueError(
                f"vLLM compiles a {text.model_type} for 1-D positions alone, and SCORE gives it three axes: start with "
                "--enforce-eager"
            )
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        text.rope_parameters = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
