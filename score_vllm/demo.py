"""The embedded demo, and the recipe for models like it: the Qwen2.5-VL architecture, seconds on two cores.

The demo's weights are trained on a small synthetic world (:mod:`score_vllm.train.world`) and come with the package.
:func:`build_model` writes checkpoints with random weights of any size: for tests, and as the start of training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent / "assets" / "demo"
SEED = 20260323
MODEL_FOLDER = "model"
POLICY_FOLDER = "policy"
# The sample clip is this one of the world's split "demo".
CLIP_INDEX = 10

# Qwen2's special tokens, in the order of its vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The format of Qwen2.5-VL's conversations, written for this project: a default system turn, vision spans, no tools.
CHAT_TEMPLATE = """
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
""".strip("\n")

# Sizes of a random model; callers override single entries through build_model(...).
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": False,
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 128,
    "tokens_per_second": 2,
}
# Pixels per image or frame, between 4 and 192 merged tokens.
PIXELS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 192 * 28 * 28}


def cache_directory() -> Path:
    """Where built models live: ``$SCORE_CACHE``, else ``$XDG_CACHE_HOME/score-vllm``, else ``~/.cache/score-vllm``."""
    if explicit := os.environ.get("SCORE_CACHE"):
        return Path(explicit).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "score-vllm"


def demo_model() -> Path:
    """The embedded demo model: a Qwen2.5-VL of 2.5 M parameters, trained from scratch on a synthetic world.

    ``python -m score_vllm.train.world`` made it; ``training.json`` beside the weights says how well it answers.

    Returns:
        Its directory, inside the installed package.

    Raises:
        FileNotFoundError: this installation lacks it.
    """
    return _asset(MODEL_FOLDER)


def ensure_demo() -> tuple[Path, Path]:
    """The embedded demo model and its retention policy.

    ``python -m score_vllm.train --config train/configs/demo.toml`` made the policy; its provenance says how.

    Returns:
        ``(model directory, policy directory)``, inside the installed package.

    Raises:
        FileNotFoundError: this installation lacks them.
    """
    return demo_model(), _asset(POLICY_FOLDER)


def _asset(name: str) -> Path:
    folder = ASSETS / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: this installation of score-vllm has no embedded demo")
    return folder


def demo_clip() -> Path:
    """A sixteen-second sample clip of the world that the demo model knows: an mp4 file inside the package."""
    return ASSETS / "clip.mp4"


def build_policy(directory: Path) -> None:
    """Write a retention policy for :func:`build_model`'s width: seeded random weights, and its config says so."""
    from score_vllm.policy import RetentionPolicy

    policy = RetentionPolicy(TEXT_CONFIG["hidden_size"], model_id="demo", seed=SEED)
    policy.save_pretrained(directory, origin="seeded random weights, not trained", seed=SEED)


def build_tokenizer(corpus: Iterable[str] = (), merges: int = 0) -> Any:
    """A byte-level tokenizer with Qwen's special tokens and a Qwen-style chat template.

    Args:
        corpus: texts whose frequent words become tokens of their own.
        merges: at most so many pairs are merged; 0 leaves the 256 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    if merges:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        size = len(alphabet) + merges
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=20, show_progress=False)
        core.train_from_iterator(corpus, trainer)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    )


def build_model(
    directory: Path,
    *,
    seed: int = SEED,
    dtype: str = "bfloat16",
    text_config: dict[str, Any] | None = None,
    vision_config: dict[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a complete Qwen2.5-VL checkpoint with seeded random weights.

    Args:
        directory: created; gets config, safetensors weights, tokenizer, processor and generation config.
        seed: of the weights.
        dtype: of the stored weights, a torch dtype name.
        text_config: overrides of :data:`TEXT_CONFIG`.
        vision_config: overrides of :data:`VISION_CONFIG`.
        tokenizer: by default :func:`build_tokenizer` without merges.
    """
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tokenizer or build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **(text_config or {}),
        },
        vision_config={**VISION_CONFIG, **(vision_config or {})},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        # Larger than the usual 0.02: attention must depend on content and position for tests to see either.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    fan_in = parameter[0].numel()
                    parameter.normal_(0.0, fan_in**-0.5)
    model.to(getattr(torch, dtype))
    directory.mkdir(parents=True)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(directory)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=PIXELS, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)
