"""Second stage of the demo model: its language model learns to answer from the tokens of its frozen vision tower.

Clips are rendered and encoded once; every step draws clips, a few of their questions, and a part of the tokens: all
of them, every second or third cell (a lower frame rate), or a random part. A model that only ever saw whole grids
would fail on any subset, whoever chose it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from score_vllm.layout import grid_layout
from score_vllm.train.world.question_blocks import Block, PackedBatch, block_logits, blocks_right, pack_blocks
from score_vllm.train.world.scenes import CAPTION_PROMPTS, FPS, Question
from score_vllm.types import VideoGrid

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
END = "<|im_end|>"
# Positions per cell: two frames at FPS, two positions per second.
T_FACTOR = 2 / FPS * 2


@dataclass(frozen=True)
class Clip:
    """One encoded clip of any world.

    Attributes:
        x: [T*N, D], of any dtype.
        leans: scores in [0, 1], [T*N] each, that subsets of a training step may lean to; the first is whether a token
            shows a thing or a letter.
        grid: T, rows, columns.
        caption: all facts of the clip.
        ask: from a generator to its questions; a pseudo-video has none.
        shown: class of what each token shows [T*N] int64, where that is known.
    """

    x: torch.Tensor
    leans: tuple[torch.Tensor, ...]
    grid: VideoGrid
    caption: str
    ask: Callable[[np.random.Generator], list[Question]]
    shown: torch.Tensor | None = None


# Makes rows of the language model's width out of kept tokens: (rows [B, K, D], indices [B, K], grid) to [B, K, W].
Project = Callable[[torch.Tensor, torch.Tensor, VideoGrid], torch.Tensor]


def as_they_are(rows: torch.Tensor, indices: torch.Tensor, grid: VideoGrid) -> torch.Tensor:
    """The projection of a tower that is the language model's own."""
    return rows


class Words:
    """Token ids of prompts and answers, each text encoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}
        self.prefix = self.ids(SYSTEM)
        self.suffix = self.ids("<|vision_end|>")

    def ids(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            self._known[text] = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def block(self, question: str, answer: str) -> Block:
        return Block(self.ids(f"{question}<|im_end|>\n<|im_start|>assistant\n"), self.ids(f"{answer}{END}"))


def keep(clip: Clip, count: int, lead: float, generator: torch.Generator) -> torch.Tensor:
    """Which tokens a training step shows, ascending.

    Args:
        clip: encoded.
        count: of tokens kept.
        lead: of the tokens with the highest score over those with the lowest: 0 is a blind draw, 1 takes them first.
        generator: of the noise, and of which score it is.
    """
    which = int(torch.randint(len(clip.leans), (), generator=generator)) if len(clip.leans) > 1 else 0
    noise = torch.rand(len(clip.x), generator=generator) + clip.leans[which] * lead
    return noise.topk(min(count, len(noise))).indices.sort().values


def draw_blocks(clip: Clip, words: Words, rng: np.random.Generator, count: int) -> list[Block]:
    """``count`` question blocks of a clip, the last of them its caption."""
    asked = clip.ask(rng)
    blocks = [words.block(q.text, q.answer) for q in asked[: count - 1]]
    while len(blocks) < count - 1 and asked:
        q = asked[int(rng.integers(len(asked)))]
        blocks.append(words.block(q.text, q.answer))
    return [*blocks, words.block(CAPTION_PROMPTS[int(rng.integers(3))], clip.caption)]


def forward(
    model: Any,
    words: Words,
    grid: VideoGrid,
    rows: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    blocks: Sequence[Sequence[Block]],
    *,
    project: Project = as_they_are,
    t_factor: float = T_FACTOR,
) -> tuple[torch.Tensor, PackedBatch]:
    """Ask questions about clips of one grid, each seen through its kept tokens.

    Args:
        model: the demo model, or one trained like it.
        words: of its tokenizer.
        grid: of every clip.
        rows: B kept tokens [K, D] each.
        indices: B flat indices [K] int64 each, where those stand in the clip.
        blocks: B lists of as many questions.
        project: from tokens to rows of the language model.
        t_factor: positions per cell.

    Returns:
        ``(logits, packed)``: logits [L, V] of every target token.
    """
    layout = grid_layout(grid, t_factor)
    offsets = layout.vision_offsets()
    packed = pack_blocks(
        model.model.language_model.embed_tokens,
        words.prefix,
        words.suffix,
        project(torch.stack(list(rows)), torch.stack(list(indices)), grid),
        torch.stack([offsets[kept] for kept in indices]),
        layout.extent,
        blocks,
    )
    return block_logits(model, packed), packed


@torch.inference_mode()
def accuracy(
    model: Any,
    words: Words,
    clips: Sequence[Clip],
    seed: int = 0,
    num_questions: int = 8,
    *,
    share: float = 1.0,
    **how: Any,
) -> dict[str, float]:
    """Share of questions answered exactly, by kind and overall, from a random share of the tokens; 0 is blind.

    Further arguments as of :func:`forward`.
    """
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[bool]] = {}
    for i, clip in enumerate(clips):
        asked = clip.ask(np.random.default_rng([seed, i]))[:num_questions]
        if not asked:
            continue
        blocks = [words.block(q.text, q.answer) for q in asked]
        with torch.autocast("cpu", torch.bfloat16):
            kept = keep(clip, round(share * len(clip.x)), 0.0, generator)
            logits, packed = forward(model, words, clip.grid, [clip.x[kept].float()], [kept], [blocks], **how)
        for q, ok in zip(asked, blocks_right(logits, packed).tolist(), strict=True):
            right.setdefault(q.kind, []).append(ok)
    all_right = [ok for values in right.values() for ok in values]
    return {
        **{kind: float(np.mean(v)) for kind, v in sorted(right.items())},
        "all": float(np.mean(all_right)),
        "n": len(all_right),
    }


def train_language(
    model: Any,
    words: Words,
    pool: Sequence[Clip],
    held: Sequence[Clip],
    steps: int,
    *,
    learning_rate: float = 1.5e-3,
    batch: int = 12,
    max_tokens: int = 1 << 30,
    num_blocks: int = 10,
    seed: int = 0,
    easy_share: float = 0.45,
    easy_counts: tuple[float, float] = (0.08, 0.3),
    full_share: float = 0.4,
    minutes: float | None = None,
    report: Any = print,
    project: Project = as_they_are,
    also: Sequence[torch.nn.Parameter] = (),
    beside: Callable[[Sequence[Clip], Sequence[torch.Tensor]], torch.Tensor] | None = None,
    t_factors: Sequence[float] = (T_FACTOR,),
) -> dict[str, float]:
    """Train everything of ``model`` but its vision tower, in place.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration in float32.
        words: of its tokenizer.
        pool: clips to learn from.
        held: clips to look at every 200 steps; never learned from.
        steps: of AdamW, cosine schedule.
        learning_rate: at its highest.
        batch, num_blocks: clips a step, and questions a clip.
        max_tokens: visual tokens a step; where more would be kept, it has fewer clips.
        seed: of everything random.
        easy_share: share of the steps that show short sequences of things: ``easy_counts`` of all tokens.
        full_share: share of the steps after those that show every token.
        minutes: stop after this long, with the schedule squeezed to fit; None: no limit.
        report: called with a line of text.
        project, t_factors: see :func:`forward`; each step draws one of the latter, held-out clips get the first.
        also: further parameters that learn, of ``project`` and ``beside``.
        beside: from the clips and kept indices of a step to a loss that is added.

    Returns:
        The last held-out accuracy.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for name, p in model.named_parameters() if ".visual." not in name] + list(also)
    held_how: dict[str, Any] = {"project": project, "t_factor": t_factors[0]}
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    by_length: dict[int, list[int]] = {}
    for i, clip in enumerate(pool):
        by_length.setdefault(clip.grid.t, []).append(i)
    asks = [bool(clip.ask(np.random.default_rng(0))) for clip in pool]
    real = [i for i, found in enumerate(asks) if found]
    pseudo = {n: rows for n, rows in by_length.items() if asks[rows[0]] or len(rows) >= 4}
    lengths = [n for n in pseudo if n != pool[real[0]].grid.t]
    started = time.monotonic()
    mean_loss, mean_right, last = 3.0, 0.0, {}
    bar = tqdm(range(steps), desc="language model", unit="step", mininterval=10)
    for step in bar:
        done = max(step / steps, (time.monotonic() - started) / 60 / minutes if minutes else 0.0)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = (
                learning_rate * min(1.0, (step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            )
        if step % 10 == 9 and lengths:
            numbers = pseudo[lengths[int(rng.integers(len(lengths)))]]
            clips = [pool[i] for i in rng.choice(numbers, batch)]
            blocks = [draw_blocks(clip, words, rng, 1) for clip in clips]
        else:
            clips = [pool[i] for i in rng.choice(real, batch)]
            blocks = [draw_blocks(clip, words, rng, num_blocks) for clip in clips]
        total = len(clips[0].x)
        # Of the steps that do not show every token, 35 in 60 lean, 15 draw blindly and 10 skip frames.
        draw = 1.0 if rng.random() < full_share else 0.6 * rng.random()
        if done < easy_share or draw < 0.35:
            # From blind draws to things alone: whoever selects, the model has met the like.
            low, high, lead = (*easy_counts, 0.9) if done < easy_share else (0.05, 0.5, float(rng.uniform(0, 1)))
            count = int(np.exp(rng.uniform(np.log(low), np.log(high))) * total)
            kept = [keep(clip, count, lead, generator) for clip in clips]
        elif draw < 0.5:
            count = int(rng.uniform(0.3, 0.9) * total)
            kept = [keep(clip, count, 0.0, generator) for clip in clips]
        elif draw < 0.6:
            stride = int(rng.integers(2, 4))
            grid = clips[0].grid
            cells = torch.arange(int(rng.integers(stride)), grid.t, stride) * grid.tokens_per_frame
            kept = [(cells[:, None] + torch.arange(grid.tokens_per_frame)).flatten()] * len(clips)
        else:
            kept = [torch.arange(total)] * len(clips)
        fits = max(1, max_tokens // len(kept[0]))
        clips, kept, blocks = clips[:fits], kept[:fits], blocks[:fits]
        with torch.autocast("cpu", torch.bfloat16):
            rows = [clip.x[k].float() for clip, k in zip(clips, kept, strict=True)]
            spread = float(rng.choice(t_factors)) if len(t_factors) > 1 else t_factors[0]
            logits, packed = forward(model, words, clips[0].grid, rows, kept, blocks, project=project, t_factor=spread)
        loss = torch.nn.functional.cross_entropy(logits.float(), packed.targets)
        if beside is not None:
            loss = loss + beside(clips, kept)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        mean_loss += 0.03 * (float(loss.detach()) - mean_loss)
        mean_right += 0.03 * (float(blocks_right(logits.detach(), packed).float().mean()) - mean_right)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{mean_loss:.3f}", right=f"{mean_right:.3f}")
        if step % 200 == 199:
            last = accuracy(model, words, held, **held_how)
            minutes_so_far = (time.monotonic() - started) / 60
            report(
                f"step {step + 1} {minutes_so_far:.1f} min loss {mean_loss:.3f} right {mean_right:.3f} held "
                + " ".join(f"{k} {v:.2f}" for k, v in last.items())
            )
    return accuracy(model, words, held, **held_how)
