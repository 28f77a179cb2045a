"""Trains the reader of real footage: ``python -m score_vllm.train.world.reader_stage --output runs/reader``.

First the projector learns what single tokens show: a shape and its colour, a letter, or the footage. Then it and the
language model learn captions and questions from random subsets of many kinds: blind, leaning to tokens of events, to
tokens that show any shape or letter, or to tokens that changed, lower frame rates, and everything. So labels are used
of what tokens show and of which belong to events; nothing says so to a policy. The reader must answer 20 points more
with all tokens than with none on other backgrounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from score_vllm import demo
from score_vllm.option_types import at_least
from score_vllm.train.schema import MissingError
from score_vllm.train.world.composite import CLASSES, FPS, GRID, caption, questions
from score_vllm.train.world.composite_source import CompositeSource, paint
from score_vllm.train.world.dinov2 import FootageEncoder
from score_vllm.train.world.footage import FOLDER, backgrounds
from score_vllm.train.world.language_stage import Clip, Words, accuracy, train_language
from score_vllm.train.world.reader import PROJECTOR, RECORD, Projector, is_reader, save_projector
from score_vllm.train.world.vlm import (
    FRAME_TEXTS,
    TEXT_CONFIG,
    VISION_CONFIG,
    initialise_language,
    load_language,
    replaced,
    tqdm_print,
)
from score_vllm.types import VideoGrid

# Clips whose texts make the vocabulary.
CORPUS = 4000
# Points of accuracy by which all tokens must beat none.
GATE = 0.20
# Positions per cell in training: as asked for most of the time, and stretched, so that longer clips' are not new.
T_FACTORS = (1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0)
# Of the language model, and of one training step.
READER_CONFIG: dict[str, Any] = TEXT_CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EASY_COUNTS, FULL_SHARE = (0.03, 0.2), 0.2
BATCH, MAX_TOKENS, BLOCKS = 10, 2048, 10
# Weight of tokens that show only the footage, against one of the others.
GROUND_WEIGHT = 0.15


def corpus() -> Iterator[str]:
    """Texts of the composites for the tokenizer's vocabulary."""
    source = CompositeSource("words", CORPUS)
    for index in range(len(source)):
        scene, asked = source.scene(index)
        yield caption(scene)
        for question in asked:
            yield from (question.text, question.answer)
    yield from FRAME_TEXTS


def read_clips(encoder: FootageEncoder, source: CompositeSource) -> list[Clip]:
    """Encoded clips of a source."""
    frames = backgrounds(source.path, source.part)
    clips = []
    for index in tqdm(range(len(source)), desc=f"{source.split} clips", unit="clip", mininterval=10):
        scene, _ = source.scene(index)
        painted = paint(scene, frames)
        x = encoder.encode(painted.frames).x
        shown = torch.from_numpy(painted.shown.reshape(-1)).long()
        changed = (x[1:] - x[:-1]).float().norm(dim=-1)
        changed = torch.cat([changed.new_zeros(1, changed.shape[1]), changed]).flatten()
        rank = changed.argsort().argsort().float() / (len(changed) - 1)
        came = torch.from_numpy(painted.came.reshape(-1)).float()
        # What changed is the top quarter; tokens of events count twice.
        leans = (came, came, (shown > 0).float(), (rank * 4 - 3).clamp(min=0))
        grid = VideoGrid(len(x), GRID, GRID)
        clips.append(Clip(x.flatten(0, 1), leans, grid, caption(scene), partial(questions, scene), shown))
    return clips


class Looks(torch.nn.Module):
    """Names what single tokens show, from the projector's rows."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.projector = projector
        self.head = torch.nn.Linear(projector.row.shape[1], CLASSES)
        self.right = 0.0

    def forward(self, clips: Sequence[Clip], kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy over kept tokens; ``right`` follows the accuracy where there is something."""
        x = torch.cat([clip.x[k] for clip, k in zip(clips, kept, strict=True)]).float()
        shown = torch.cat([clip.shown[k] for clip, k in zip(clips, kept, strict=True) if clip.shown is not None])
        logits = self.head(self.projector.looks(x))
        there = shown > 0
        if bool(there.any()):
            hit = float((logits.argmax(-1) == shown)[there].float().mean())
            self.right += 0.02 * (hit - self.right)
        weights = torch.tensor([GROUND_WEIGHT] + [1.0] * (CLASSES - 1))
        return torch.nn.functional.cross_entropy(logits, shown, weight=weights)


def train_projector(looks: Looks, clips: Sequence[Clip], steps: int, seed: int = 0) -> None:
    """Mean and scale of the channels, then what single tokens show."""
    projector = looks.projector
    some = torch.cat([clip.x for clip in clips[:: max(1, len(clips) // 200)]]).float()
    projector.mean.copy_(some.mean(0))
    projector.scale.copy_(some.std(0))
    optimiser = torch.optim.AdamW([p for p in looks.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="projector", unit="step", mininterval=10)
    for _ in bar:
        chosen = [clips[i] for i in torch.randint(len(clips), (8,), generator=generator)]
        loss = looks(chosen, [torch.arange(len(clip.x)) for clip in chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(right=f"{looks.right:.3f}", refresh=False)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Both stages and the gate; returns the record that is written beside the weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    if args.reader_from and not is_reader(args.reader_from):
        raise MissingError(f"--reader-from {args.reader_from} is no reader: it has no {PROJECTOR}")
    started = time.monotonic()
    torch.manual_seed(args.seed)
    with replaced(Path(args.output), RECORD) as staging:
        encoder = FootageEncoder(args.footage, args.max_gib)
        pool = read_clips(encoder, CompositeSource("reader", args.clips, str(args.footage)))
        held = read_clips(encoder, CompositeSource("validation", args.validation, str(args.footage)))
        encoded = time.monotonic()
        tokenizer = demo.build_tokenizer(corpus(), merges=400)
        demo.build_model(
            staging,
            dtype="float32",
            text_config=READER_CONFIG,
            vision_config=VISION_CONFIG
            | {
                "depth": 1,
                "out_hidden_size": READER_CONFIG["hidden_size"],
                "fullatt_block_indexes": [0],
                "temporal_patch_size": 1,
            },
            tokenizer=tokenizer,
            seed=args.seed,
        )
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(staging, dtype=torch.float32)
        initialise_language(model, args.seed)
        projector = Projector(READER_CONFIG["hidden_size"])
        looks = Looks(projector)
        if args.reader_from:
            load_language(model, args.reader_from)
            projector.load_state_dict(load_file(Path(args.reader_from) / PROJECTOR))
        train_projector(looks, pool, args.projector_steps, args.seed)
        words = Words(tokenizer)
        train_language(
            model,
            words,
            pool,
            held[:48],
            args.steps,
            learning_rate=args.learning_rate,
            batch=BATCH,
            max_tokens=MAX_TOKENS,
            num_blocks=BLOCKS,
            easy_share=args.easy_share,
            easy_counts=EASY_COUNTS,
            full_share=FULL_SHARE,
            seed=args.seed,
            minutes=args.minutes,
            report=tqdm_print,
            project=projector,
            also=list(looks.parameters()),
            beside=looks,
            t_factors=T_FACTORS,
        )
        how: dict[str, Any] = {"project": projector, "t_factor": T_FACTORS[0]}
        shares = {str(share): accuracy(model, words, held, share=share, **how) for share in (1.0, 0.25, 0.1, 0.0)}
        record = {
            "footage": str(args.footage),
            "fps": FPS,
            "token_accuracy": looks.right,
            # By share of tokens kept at random; "0.0" is blind.
            "validation_accuracy": shares,
            "gate": GATE,
            "passed": shares["1.0"]["all"] >= shares["0.0"]["all"] + GATE,
            "arguments": {
                key: value for key, value in vars(args).items() if key not in ("output", "footage", "reader_from")
            },
            "minutes": {
                "clips": round((encoded - started) / 60, 1),
                "training": round((time.monotonic() - encoded) / 60, 1),
            },
            "parameters": sum(p.numel() for name, p in model.named_parameters() if ".visual." not in name)
            + sum(p.numel() for p in projector.parameters()),
        }
        model.save_pretrained(staging)
        save_projector(projector, staging, record)
        for path in staging.glob("*.safetensors"):
            path.chmod(0o644)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where the reader does not pass its gate, 2 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="directory of the checkpoint; replaced")
    parser.add_argument("--footage", type=Path, default=Path(FOLDER), help=f"default: {FOLDER}")
    parser.add_argument("--max-gib", type=float, default=8.0, help="most that features may take on disk")
    parser.add_argument("--reader-from", help="go on from this reader")
    parser.add_argument("--clips", type=at_least(1), default=1400)
    parser.add_argument("--validation", type=at_least(1), default=96, help="clips on other backgrounds")
    parser.add_argument("--projector-steps", type=at_least(1), default=400)
    parser.add_argument("--steps", type=at_least(1), default=2500)
    parser.add_argument("--minutes", type=float, help="of the language model, at most (default: no limit)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--easy-share", type=float, default=0.4, help="short sequences first")
    parser.add_argument("--seed", type=int, default=0)
    try:
        record = train(parser.parse_args(arguments))
    except (MissingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = record["validation_accuracy"]
    print(f"all tokens {found['1.0']['all']:.1%}, none {found['0.0']['all']:.1%} of {found['1.0']['n']} questions")
    if not record["passed"]:
        print(f"error: all tokens must be {GATE:.0%} above none; more clips or minutes may help", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
