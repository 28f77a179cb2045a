"""Trains the embedded demo model from nothing: ``python -m score_vllm.train.world --output DIRECTORY``.

Two stages on the synthetic world: the vision tower on labels per token, then the language model on captions and
questions over the frozen tower's tokens. Needs no files and no GPU. What it writes is a complete checkpoint, and a
record of how it was made and how many held-out questions it answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from score_vllm import demo
from score_vllm.files import may_replace, replaced_folder
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.world.drawn_clips import encode_pool
from score_vllm.train.world.language_stage import Words, accuracy, train_language
from score_vllm.train.world.render import render, write_clip
from score_vllm.train.world.scenes import (
    CAPTION_PROMPTS,
    caption,
    clip_rng,
    make_clip,
    make_pseudo_scene,
    make_scene,
    questions,
)
from score_vllm.train.world.vision_stage import train_vision

TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_heads": 3,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": 192,
}
RECORD = "training.json"
# What stands around every question, as often as it takes for the tokenizer to learn it.
FRAME_TEXTS = (*CAPTION_PROMPTS, "system\nYou are a helpful assistant.", "user\n", "assistant\n") * 50


def corpus() -> Iterator[str]:
    """Texts of the world for the tokenizer's vocabulary."""
    for index in range(4000):
        rng = clip_rng("words", index)
        scene = make_pseudo_scene(rng) if index % 8 == 7 else make_scene(rng)
        yield caption(scene)
        if not scene.texts:
            for question in questions(scene, rng):
                yield from (question.text, question.answer)
    yield from FRAME_TEXTS


@contextlib.contextmanager
def replaced(output: Path, record: str) -> Iterator[Path]:
    """:func:`score_vllm.files.replaced_folder` of a training's output, checked.

    Args:
        output: of a training.
        record: file by which an earlier one's output is known.

    Raises:
        ConfigurationError: ``output`` is there and is something else.
    """
    if not may_replace(output, record):
        raise ConfigurationError(
            f"--output {str(output)!r} exists and is not from an earlier run (no {record}); refusing to replace it"
        )
    with replaced_folder(output.resolve()) as staging:  # a link's folder is replaced, not the link
        yield staging


def initialise_language(model: Any, seed: int) -> None:
    """Starting weights that suit embeddings of unit size: the vision tower's, and then the words'."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.get_text_config().num_hidden_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".visual." in name or parameter.ndim < 2:
                continue
            scale = parameter.shape[1] ** -0.5
            if "embed_tokens" in name:
                scale = 0.5
            elif "o_proj" in name or "down_proj" in name:
                scale /= (2 * layers) ** 0.5
            elif "lm_head" in name:
                scale *= 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def load_language(model: Any, source: str) -> None:
    """Weights of another run's language model, to go on from."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    other = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).state_dict()
    model.load_state_dict({k: v for k, v in other.items() if ".visual." not in k}, strict=False)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Both stages; returns the record that is written beside the weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    started = time.monotonic()
    with replaced(Path(args.output), RECORD) as staging:
        tokenizer = demo.build_tokenizer(corpus(), merges=400)
        demo.build_model(
            staging,
            dtype="float32",
            text_config=TEXT_CONFIG,
            vision_config=VISION_CONFIG,
            tokenizer=tokenizer,
            seed=args.seed,
        )
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(staging, dtype=torch.float32)
        if args.vision_from:
            source = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.vision_from, dtype=torch.float32)
            model.model.visual.load_state_dict(source.model.visual.state_dict())
            seen: dict[str, float] = {}
        else:
            seen = train_vision(model, args.vision_steps, seed=args.seed)
        for parameter in model.model.visual.parameters():
            parameter.requires_grad_(False)
        # The tower that learns is the tower that will be served: bf16 weights.
        model.model.visual.bfloat16().float()
        if args.language_from:
            load_language(model, args.language_from)
        else:
            initialise_language(model, args.seed)
        words = Words(tokenizer)
        pool = encode_pool(model.model.visual, "language", args.clips, args.first_clip)
        held = encode_pool(model.model.visual, "validation", 64)
        train_language(
            model,
            words,
            pool,
            held,
            args.language_steps,
            learning_rate=args.learning_rate,
            easy_share=args.easy_share,
            seed=args.seed,
            minutes=args.minutes,
            report=tqdm_print,
        )
        model.bfloat16()
        model.save_pretrained(staging)
        (staging / "model.safetensors").chmod(0o644)
        model.float()
        final = accuracy(model, words, encode_pool(model.model.visual, "validation", 200, first=1000))
        record = {
            "vision_accuracy": seen,
            "validation_accuracy": final,
            "arguments": {
                key: value
                for key, value in vars(args).items()
                if key not in ("output", "vision_from", "language_from", "clip")
            },
            "minutes": round((time.monotonic() - started) / 60, 1),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def tqdm_print(text: str) -> None:
    """A line above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits with 2 where the output cannot be replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="directory of the checkpoint; replaced")
    parser.add_argument("--clip", type=Path, help="also write the demo's sample clip to this file")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--vision-from", help="take the vision tower of this checkpoint instead of training one")
    parser.add_argument("--language-from", help="go on from the language model of this checkpoint")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="of the second stage")
    parser.add_argument("--easy-share", type=float, default=0.45, help="of the second stage: short sequences first")
    parser.add_argument("--first-clip", type=int, default=0, help="of the second stage's clips")
    parser.add_argument("--language-steps", type=int, default=6000)
    parser.add_argument("--clips", type=int, default=4000, help="clips encoded for the second stage")
    parser.add_argument("--minutes", type=float, help="of the second stage, at most (default: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.clip:
        write_clip(render(make_clip("demo", demo.CLIP_INDEX)[0]).frames, args.clip)
    try:
        tqdm_print(json.dumps(train(args), indent=2))
    except ConfigurationError as error:
        parser.exit(2, f"error: {error}\n")
