"""Tiny random checkpoints of every family, whole enough for vLLM and transformers alike.

What must be said so that both read the same model: Qwen3-VL's image processor needs mean and std 0.5 (vLLM normalises
videos by them); transformers 5.19 writes SigLIP without ``vision_model.`` and fused experts transposed; gated delta net
on the CPU wants a head of 128.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from score_vllm import RetentionPolicy
from score_vllm.demo import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer

HIDDEN = 128
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# SigLIP of 126 pixels: 9 x 9 patches, pooled to 5 x 5 (OneVision) or 4 x 4 (LLaVA-Video).
SIDE = {"height": 126, "width": 126}
PINPOINTS = [[126, 126], [126, 252], [252, 126]]


def special_ids(tokenizer: Any, *more: str) -> dict[str, int]:
    return {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, *more)}


def text_config(tokenizer: Any, ids: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(tokenizer),
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
        **changes,
    }


def write(model: Any, ids: dict[str, int], directory: Path, dtype: str, fix: Callable[..., Any] | None) -> None:
    """Large random weights, so that attention depends on content and position."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    model.to(getattr(torch, dtype))
    model.generation_config = tf.GenerationConfig(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]])
    model.save_pretrained(directory)
    if fix is not None:
        path = directory / "model.safetensors"
        renamed = dict(fix(name, weight) for name, weight in load_file(path).items())
        save_file(renamed, path, metadata={"format": "pt"})


def build_qwen3(directory: Path, kind: str, dtype: str = "float32") -> None:
    """``qwen3_vl``, ``qwen3_vl_moe``, ``qwen3_5`` or ``qwen3_5_moe``; 16-pixel patches, 32 pixels a token."""
    tokenizer = build_tokenizer()
    ids = special_ids(tokenizer)
    text = text_config(tokenizer, ids, rope_parameters={**ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True})
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    fix = None
    if kind == "qwen3_vl":
        config_class, model_class = tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration
    elif kind == "qwen3_vl_moe":
        config_class, model_class = tf.Qwen3VLMoeConfig, tf.Qwen3VLMoeForConditionalGeneration
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
        text |= {"norm_topk_prob": True}

        def fix(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
            return name, weight.transpose(1, 2).contiguous() if ".experts." in name and weight.ndim == 3 else weight
    else:
        config_class, model_class = tf.Qwen3_5Config, tf.Qwen3_5ForConditionalGeneration
        if kind == "qwen3_5_moe":
            config_class, model_class = tf.Qwen3_5MoeConfig, tf.Qwen3_5MoeForConditionalGeneration
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
            text |= {"shared_expert_intermediate_size": 64}
        vision.pop("deepstack_visual_indexes")
        sections = {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        text |= {"head_dim": 64, "rope_parameters": {**ROPE, **sections}, "full_attention_interval": 2}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
        text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    config = config_class(
        text_config=text,
        vision_config=vision,
        architectures=[model_class.__name__],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write(model_class(config), ids, directory, dtype, fix)
    half = [0.5] * 3
    area = {"shortest_edge": 4 * 32 * 32, "longest_edge": 192 * 32 * 32}
    patches: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    tf.Qwen3VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=area, image_mean=half, image_std=half, **patches),
        tokenizer=tokenizer,
        video_processor=tf.Qwen3VLVideoProcessor(
            size={"shortest_edge": 4 * 32 * 32, "longest_edge": 32 * 192 * 32 * 32}, max_frames=64
        ),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def build_qwen2_vl(directory: Path, dtype: str = "float32") -> None:
    """14-pixel patches, 28 pixels a token."""
    tokenizer = build_tokenizer()
    ids = special_ids(tokenizer)
    text = text_config(tokenizer, ids, rope_parameters={**ROPE, "mrope_section": [4, 6, 6]}, num_hidden_layers=2)
    text.pop("head_dim")
    config = tf.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 2},
        architectures=["Qwen2VLForConditionalGeneration"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write(tf.Qwen2VLForConditionalGeneration(config), ids, directory, dtype, None)
    area = {"shortest_edge": 4 * 28 * 28, "longest_edge": 192 * 28 * 28}
    tf.Qwen2VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=area),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(size=area, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def llava_tokenizer() -> Any:
    """Qwen2's with the two placeholders."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer


def build_llava(directory: Path, dtype: str = "float32", **options: str) -> None:
    """LLaVA-OneVision; LLaVA-Video with ``mm_spatial_pool_mode`` and ``mm_newline_position``."""
    tokenizer = llava_tokenizer()
    ids = special_ids(tokenizer, "<image>", "<video>")
    text = text_config(tokenizer, ids, model_type="qwen2", rope_parameters=ROPE, num_hidden_layers=3)
    text.pop("head_dim")
    config = tf.LlavaOnevisionConfig(
        text_config=text,
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 126,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
        architectures=["LlavaOnevisionForConditionalGeneration"],
        **options,
    )

    def fix(name: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
        if "vision_tower." in name and "vision_model" not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        return name, weight

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.LlavaOnevisionForConditionalGeneration(config)
        model.model.image_newline.data.normal_()
        write(model, ids, directory, dtype, fix)
    template = CHAT_TEMPLATE
    for kind, token in (("image", "<image>"), ("video", "<video>")):
        template = template.replace(f"<|vision_start|><|{kind}_pad|><|vision_end|>", token)
    tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(size=SIDE),
        num_image_tokens=81,
        vision_feature_select_strategy="full",
        chat_template=template,
    ).save_pretrained(directory)


# Converted name -> original, by prefix.
ORIGINAL = (
    ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)


def write_original(known: Path, source: Path) -> None:
    """A :func:`build_llava` checkpoint as the original LLaVA-Video is: its names, its config, two shards."""
    weights = {}
    for name, weight in load_file(known / "model.safetensors").items():
        old = next((new + name.removeprefix(prefix) for prefix, new in ORIGINAL if name.startswith(prefix)), name)
        weights[old] = weight
    weights["model.vision_tower.vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 64)
    build_tokenizer().save_pretrained(source)
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, source / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, source / "model-00002-of-00002.safetensors")
    text = json.loads((known / "config.json").read_text())["text_config"]
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config: dict[str, Any] = {
        key: text[key] for key in (*kept, "max_position_embeddings", "rms_norm_eps", "vocab_size")
    }
    config |= {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "rope_theta": 10000.0}
    config |= {"image_grid_pinpoints": "(1x1),...,(2x2)", "mm_spatial_pool_mode": "average", "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))


def build_policy(directory: Path, architecture: str) -> None:
    """Seeded random weights for the architecture."""
    RetentionPolicy(HIDDEN, architecture=architecture, seed=3).save_pretrained(directory)
