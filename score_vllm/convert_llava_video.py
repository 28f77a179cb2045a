"""``python -m score_vllm.convert_llava_video SRC DST``: an original LLaVA-Video checkpoint in transformers' format.

The original's ``config.json`` (``LlavaQwenForCausalLM``) does not describe its tower, and no server reads it. Weights
are renamed, not changed, one shard at a time; the config gains a SigLIP tower and LLaVA-Video's pooling and newlines
(:mod:`score_vllm.models.llava_onevision`). Needs no model code, only the checkpoint's files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SOURCE_ARCHITECTURE = "LlavaQwenForCausalLM"
TOWER = "model.vision_tower.vision_tower.vision_model."
# Original name -> converted; the first that fits, by prefix. None: not read by the model.
PREFIXES: tuple[tuple[str, str | None], ...] = (
    (f"{TOWER}head.", None),
    (f"{TOWER}post_layernorm.", "vision_tower.vision_model.post_layernorm."),
    (TOWER, "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# How published methods evaluate LLaVA-Video; used where the source's config says nothing.
LAYOUT = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average"}
TEXT_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)
# SigLIP-SO400M at 384 pixels, the tower of every LLaVA-Video checkpoint, where the weights do not say otherwise.
HEADS = 16
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CHAT_TEMPLATE = """
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] if part['type'] != 'text' -%}
{%- if part['type'] in ('image', 'image_url') -%}<image>
{% elif part['type'] in ('video', 'video_url') -%}<video>
{% endif -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
""".strip("\n")


class ConversionError(Exception):
    """The source cannot be converted; the message is the one sentence that is printed."""


def rename(name: str) -> str | None:
    """Converted name of a weight; None where it is dropped.

    Raises:
        ConversionError: a weight of no known kind.
    """
    for prefix, target in PREFIXES:
        if name.startswith(prefix):
            return None if target is None else target + name.removeprefix(prefix)
    raise ConversionError(f"weight {name!r} is of no LLaVA-Video checkpoint that this converter knows")


def convert(source: Path, target: Path, heads: int = HEADS) -> dict[str, str]:
    """Write the converted checkpoint; the directory appears whole or not at all.

    Args:
        source: directory of the original: config.json, safetensors, tokenizer.
        target: created; must not exist.
        heads: attention heads of the tower, which no file of the source states.

    Returns:
        The layout options, and where each came from.

    Raises:
        ConversionError: a file is missing, the checkpoint is of another kind, or ``target`` exists.
    """
    if target.exists():
        raise ConversionError(f"{target} exists; give a path that does not")
    original = read_config(source)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ConversionError(f"{source} holds no *.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shapes = _write_weights(shards, staging)
        tokenizer = _tokenizer(source)
        config, chosen = _config(original, shapes, tokenizer, heads)
        _write_processor(config, tokenizer, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", staging / "generation_config.json")
        staging.chmod(0o755)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return chosen


def read_config(source: Path) -> dict[str, Any]:
    """The original's config.json.

    Raises:
        ConversionError: there is none, or it is of another architecture.
    """
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read {source / 'config.json'}: {error}") from error
    if config.get("architectures") != [SOURCE_ARCHITECTURE]:
        raise ConversionError(f"{source} is {config.get('architectures')}, not ['{SOURCE_ARCHITECTURE}']")
    if missing := [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in config]:
        raise ConversionError(f"{source / 'config.json'} lacks the keys {missing}")
    return config


def _write_weights(shards: list[Path], target: Path) -> dict[str, tuple[int, ...]]:
    """Rename shard by shard; returns the shape of every weight under its new name."""
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = dict(_renamed(shard))
        if doubled := sorted(set(weights) & set(shapes)):
            raise ConversionError(f"{shard} repeats the weights {doubled[:3]}")
        shapes |= {key: tuple(weight.shape) for key, weight in weights.items()}
        size += sum(weight.nbytes for weight in weights.values())
        index |= dict.fromkeys(weights, name)
        save_file(weights, target / name, metadata={"format": "pt"})
        (target / name).chmod(0o644)
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2) + "\n", encoding="utf-8"
    )
    return shapes


def _renamed(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(shard, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if (new := rename(name)) is not None:
                yield new, file.get_tensor(name)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read the tokenizer of {source}: {str(error).splitlines()[0]}") from error
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer


def _config(
    original: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokenizer: Any, heads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    tower = "vision_tower.vision_model."
    try:
        patches, width = shapes[f"{tower}embeddings.position_embedding.weight"]
        patch_size = shapes[f"{tower}embeddings.patch_embedding.weight"][-1]
        wide = shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0]
        rows = shapes["language_model.model.embed_tokens.weight"][0]
    except KeyError as error:
        raise ConversionError(f"the checkpoint has no weight {error}: its vision tower is not a SigLIP") from None
    layers = {name.split(".")[4] for name in shapes if name.startswith(f"{tower}encoder.layers.")}
    if width % heads:
        raise ConversionError(f"the tower's width {width} is no multiple of its {heads} heads; say --vision-heads")
    if len(tokenizer) > rows:
        raise ConversionError(f"the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows")
    text = {key: original[key] for key in TEXT_KEYS if key in original}
    rope = {"rope_type": "default", "rope_theta": original.get("rope_theta", 10000.0)}
    text |= {"model_type": "qwen2", "rope_parameters": rope, "vocab_size": rows}
    if original.get("rope_scaling"):
        raise ConversionError(f"rope_scaling {original['rope_scaling']} of the source is not supported")
    # The original names its sampling of the tower's output where it differs from the layout below.
    chosen = {key: str(original.get(key, default)) for key, default in LAYOUT.items()}
    sources = {key: f"{value} ({'config.json' if key in original else 'default'})" for key, value in chosen.items()}
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": _pinpoints(original.get("image_grid_pinpoints"), round(patches**0.5) * patch_size),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token_index": tokenizer.convert_tokens_to_ids("<video>"),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": bool(original.get("tie_word_embeddings", False)),
        "torch_dtype": original.get("torch_dtype", "bfloat16"),
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            **SIGLIP,
            "hidden_size": width,
            "image_size": round(patches**0.5) * patch_size,
            "intermediate_size": wide,
            "model_type": "siglip_vision_model",
            "num_attention_heads": heads,
            "num_hidden_layers": len(layers),
            "patch_size": patch_size,
            "vision_use_head": False,
        },
        # The last layer that the checkpoint has: the original drops the tower's 27th.
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **chosen,
    }
    return config, sources


def _pinpoints(given: Any, side: int) -> list[list[int]]:
    """Sizes of images in tiles, from a list of sizes or from a range such as ``(1x1),...,(6x6)``."""
    if not given:
        return [[side, side]]
    if isinstance(given, str) and (ends := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", given)):
        low_h, low_w, high_h, high_w = (int(number) for number in ends.groups())
        return [[h * side, w * side] for h in range(low_h, high_h + 1) for w in range(low_w, high_w + 1)]
    if isinstance(given, list) and all(isinstance(size, list) and len(size) == 2 for size in given):
        return given
    raise ConversionError(f"image_grid_pinpoints must be a list of sizes or a range of tiles, got {given!r}")


def _write_processor(config: dict[str, Any], tokenizer: Any, target: Path) -> None:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    vision = config["vision_config"]
    pinpoints = config["image_grid_pinpoints"]
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    half["size"] = {"height": vision["image_size"], "width": vision["image_size"]}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=pinpoints, **half),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**half),
        num_image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)


def main(argv: list[str] | None = None) -> int:
    """Run as a command; the exit status."""
    parser = argparse.ArgumentParser("python -m score_vllm.convert_llava_video", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="directory of the original checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to write; must not exist")
    parser.add_argument(
        "--vision-heads",
        type=int,
        default=HEADS,
        metavar="N",
        help="attention heads of the tower (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        chosen = convert(args.source, args.target, args.vision_heads)
    except ConversionError as error:
        sys.stderr.write(f"convert_llava_video: {error}\n")
        return 1
    for key, value in sorted(chosen.items()):
        sys.stdout.write(f"{key}: {value}\n")
    sys.stdout.write(f"wrote {args.target}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
