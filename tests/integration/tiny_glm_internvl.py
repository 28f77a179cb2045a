"""Tiny random checkpoints of GLM-4.1V, GLM-4.6V and InternVL3.5; see :mod:`tests.integration.tiny_families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from score_vllm.demo import CHAT_TEMPLATE, build_tokenizer

from .tiny_families import HIDDEN, ROPE, special_ids, text_config, write

GLM_TOKENS = [f"<|{part}{kind}|>" for kind in ("image", "video") for part in ("begin_of_", "", "end_of_")]
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# 8 x 8 patches, 4 x 4 tokens a frame.
INTERNVL_SIDE = 112


def _template(image: str, video: str) -> str:
    template = CHAT_TEMPLATE
    for kind, token in (("image", image), ("video", video)):
        template = template.replace(f"<|vision_start|><|{kind}_pad|><|vision_end|>", token)
    return template


def build_glm(directory: Path, kind: str = "glm4v", dtype: str = "float32") -> None:
    """``glm4v``: GLM-4.1V. ``glm4v_moe``: GLM-4.6V, whose processor is another one. 14-pixel patches, 28 a token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": GLM_TOKENS})
    ids = special_ids(tokenizer, *GLM_TOKENS)
    rope = {**ROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    text = text_config(tokenizer, ids, rope_parameters=rope, num_hidden_layers=3)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "image_size": 126,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 128,
    }
    config_class, model_class = tf.Glm4vConfig, tf.Glm4vForConditionalGeneration
    if kind == "glm4v_moe":
        config_class, model_class = tf.Glm4vMoeConfig, tf.Glm4vMoeForConditionalGeneration
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        # Hub checkpoints have it and vLLM reads it; transformers' config does not know it.
        text |= {"use_qk_norm": False}
    else:
        text.pop("head_dim")
    config = config_class(
        text_config=text,
        vision_config=vision,
        architectures=[model_class.__name__],
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write(model_class(config), ids, directory, dtype, None)
    # The limits are of all frames of an image (2) or a video.
    cell = 2 * 28 * 28
    size = {"shortest_edge": 4 * cell, "longest_edge": 192 * cell}
    video_size = {"shortest_edge": 4 * cell, "longest_edge": 32 * 192 * cell}
    if kind == "glm4v_moe":
        processor, image, video = tf.Glm46VProcessor, tf.Glm46VImageProcessor, tf.Glm46VVideoProcessor
    else:
        processor, image, video = tf.Glm4vProcessor, tf.Glm4vImageProcessor, tf.Glm4vVideoProcessor
    processor(
        image_processor=image(size=size),
        tokenizer=tokenizer,
        video_processor=video(size=video_size),
        chat_template=_template("".join(GLM_TOKENS[:3]), "".join(GLM_TOKENS[3:])),
    ).save_pretrained(directory)


def build_internvl(directory: Path, dtype: str = "float32") -> None:
    """InternVL3.5 in transformers' format: InternViT, Qwen3."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(INTERNVL_TOKENS.values())})
    tokenizer._set_model_specific_special_tokens(special_tokens=INTERNVL_TOKENS)
    ids = special_ids(tokenizer, *INTERNVL_TOKENS.values())
    size = {"height": INTERNVL_SIDE, "width": INTERNVL_SIDE}
    config = tf.InternVLConfig(
        text_config=text_config(tokenizer, ids, model_type="qwen3", rope_parameters=ROPE, num_hidden_layers=3),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
            "image_size": [INTERNVL_SIDE] * 2,
            "patch_size": [14, 14],
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=16,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write(tf.InternVLForConditionalGeneration(config), ids, directory, dtype, None)
    tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=2, crop_to_patches=True),
        tokenizer=tokenizer,
        video_processor=tf.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_template("<IMG_CONTEXT>\n", "<video>\n"),
    ).save_pretrained(directory)
