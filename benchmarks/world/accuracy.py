"""Accuracy on held-out questions of the synthetic world, for every method and policy, at every ratio, in one run.

    python benchmarks/accuracy.py --benchmark world --policies runs/policies

The model is the embedded demo, trained from scratch on this world: these are answers about what selection loses, not
claims about a 7B. Clips go through H.264 as a served file does; the tower, the selection and the language model are
the ones that serve (transformers path; tests/e2e holds the served path against it). First of all ratio 1 must give
exactly the answers of the uncompressed model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.harness import RESULTS, at_least, percent, ratios
from benchmarks.report import publish
from score_vllm import RetentionPolicy, VideoGrid, methods, select_tokens
from score_vllm.train.world.language_stage import Words, forward
from score_vllm.train.world.question_blocks import blocks_right
from score_vllm.train.world.render import render
from score_vllm.train.world.scenes import make_clip
from score_vllm.train.world.vision_stage import through_codec
from score_vllm.vision.tower import VisionTower

METHODS = (
    "random",
    "uniform",
    "evs",
    "vidcom2",
    "vcast",
    "fastvid",
    "holitom",
    "dycoke",
    "flashvid",
    "tango",
)


@dataclass(frozen=True)
class HeldOut:
    """An encoded clip and its questions: x [T, N, D] fp32, saliency [T, N] of each kind, (kind, text, answer) each, and
    the footage that it was made of, if any."""

    x: torch.Tensor
    saliency: dict[str, torch.Tensor]
    grid: VideoGrid
    questions: tuple[tuple[str, str, str], ...]
    background: str = ""


@dataclass(frozen=True)
class Candidate:
    """A row of the table before it is run: a registered method, or one trained policy of a family.

    Attributes:
        name: of the row.
        method: registered.
        policy, seed: of a trained one.
        channels: mean and scale [D] each, where it reads standardised tokens; what it keeps is scaled back.
    """

    name: str
    method: str
    policy: RetentionPolicy | None = None
    seed: int | None = None
    channels: tuple[torch.Tensor, torch.Tensor] | None = None

    def select(self, clip: HeldOut, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [K, D] that the language model reads, and their flat indices [K]."""
        mean, scale = self.channels or (0.0, 1.0)
        ranked_by = methods.get(self.method).saliency or ""
        x = clip.x if self.channels is None else (clip.x - mean) / scale
        made = select_tokens(x, ratio, self.method, self.policy, clip.saliency.get(ranked_by), grid=clip.grid)
        return made.embeddings if self.channels is None else made.embeddings * scale + mean, made.indices


# What a clip's language model reads: rows [K, D] and flat indices [K].
Select = Callable[[HeldOut], tuple[torch.Tensor, torch.Tensor]]


def everything(clip: HeldOut) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, without selecting."""
    flat = clip.x.flatten(0, 1)
    return flat, torch.arange(len(flat))


def method_names(text: str) -> list[str]:
    """An argparse type: methods without training, with commas between; none where it is empty."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(METHODS)}, got {', '.join(unknown)}")
    return names


def one_ratio(text: str) -> float:
    """An argparse type: one number in (0, 1]."""
    found = ratios(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"must be one number in (0, 1], got {text!r}")
    return found[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the world benchmark."""
    parser.add_argument("--model", default="demo", help="'demo' or a directory of score_vllm.train.world's")
    add_world_arguments(parser, "0.4,0.25,0.1", 160, "accuracy_world.json")


def add_world_arguments(parser: argparse.ArgumentParser, kept: str, clips: int, output: str) -> None:
    """Options of a table over either world, with its default ratios, number of clips and results file."""
    add = parser.add_argument
    add("--policies", type=Path, help="folder with policies NAME-SEED/policy, as train_policies.py leaves it")
    add("--methods", type=method_names, default=",".join(METHODS), help="with commas between (default: %(default)s)")
    add(
        "--ranked-share",
        type=one_ratio,
        metavar="S",
        help="each policy also so: the best S of all tokens, the rest even; 1: all ranked",
    )
    add("--ratios", type=ratios, default=kept, help="with commas between")
    # Of fewer there is no standard error.
    add("--clips", type=at_least(2), default=clips)
    add("--questions", type=at_least(1), default=8, help="per clip, at most")
    add("--split", default="held_out", help="'validation' while tuning, so that held_out stays unseen")
    add("--output", type=Path, default=RESULTS / output)
    add("--threads", type=at_least(1), help="of torch")


def held_out_clips(model: Path, split: str, count: int, per_clip: int) -> list[HeldOut]:
    """Render, compress as a video file, and encode the clips of a split."""
    tower = VisionTower(model)
    found = []
    for index in tqdm(range(count), desc="clips", unit="clip"):
        scene, asked = make_clip(split, index)
        x, grid, saliency = tower.encode_with_saliency(through_codec(render(scene).frames))
        found.append(HeldOut(x, saliency, grid, tuple((q.kind, q.text, q.answer) for q in asked[:per_clip])))
    return found


@torch.inference_mode()
def answer(
    model: Any, words: Words, clips: Sequence[HeldOut], select: Select, batch: int = 8, **how: Any
) -> tuple[list[list[bool]], list[float], float]:
    """Ask every question of every clip.

    Args:
        model, words: the language model's.
        clips: held-out.
        select: what of a clip is read.
        batch: clips in one forward; their selections are equally long.
        how: further arguments of :func:`score_vllm.train.world.language_stage.forward`.

    Returns:
        ``(right, losses, achieved)``: per clip and question whether the answer is exactly right, the mean
        cross-entropy of every clip's answers, and the share of tokens that were kept.
    """
    right: list[list[bool]] = []
    losses: list[float] = []
    kept = total = 0
    for start in range(0, len(clips), batch):
        group = clips[start : start + batch]
        chosen = [select(clip) for clip in group]
        rows, indices = [made[0] for made in chosen], [made[1] for made in chosen]
        kept += sum(map(len, rows))
        total += sum(clip.grid.num_tokens for clip in group)
        grid = group[0].grid
        for width in sorted({len(clip.questions) for clip in group}):
            mine = [i for i, clip in enumerate(group) if len(clip.questions) == width]
            blocks = [[words.block(text, reply) for _, text, reply in group[i].questions] for i in mine]
            logits, packed = forward(
                model, words, grid, [rows[i] for i in mine], [indices[i] for i in mine], blocks, **how
            )
            ok = blocks_right(logits, packed).view(len(mine), width).tolist()
            loss = torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")
            owner = packed.owners // width
            for place in range(len(mine)):
                right.append(ok[place])
                losses.append(float(loss[owner == place].mean()))
    return right, losses, kept / total


def candidates(methods: Sequence[str], policies: Path | None, ranked_share: float | None = None) -> list[Candidate]:
    """Registered methods, then every trained policy found, and each again with another ``ranked_share``.

    Raises:
        SystemExit: the folder holds no policy.
    """
    found = [Candidate(name, name) for name in methods]
    if policies is not None:
        trained = sorted(policies.glob("*-[0-9]*/policy"))
        if not trained:
            raise SystemExit(f"error: --policies {policies} has no folder NAME-SEED/policy")
        for path in trained:
            name, seed = path.parent.name.rsplit("-", 1)
            policy = RetentionPolicy.from_pretrained(path)
            found.append(Candidate(name, "score", policy, int(seed)))
            if ranked_share not in (None, policy.config.ranked_share):
                again = RetentionPolicy.from_pretrained(path)
                again.config = replace(again.config, ranked_share=ranked_share)
                rule = "all ranked" if ranked_share == 1 else f"best {percent(ranked_share)}"
                found.append(Candidate(f"{name}, {rule}", "score", again, int(seed)))
    return found


def summarise(name: str, ratio: float, runs: Sequence[dict[str, Any]], vanilla: float) -> dict[str, Any]:
    """One row from the runs of a candidate's seeds; the spread is the sample standard deviation over seeds."""
    values = [run["accuracy"] for run in runs]
    kinds = sorted({kind for run in runs for kind in run["kinds"]})
    return {
        "method": name,
        "retention_ratio": ratio,
        "achieved_ratio": statistics.mean(run["achieved"] for run in runs),
        "accuracy": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "of_vanilla": statistics.mean(values) / vanilla if vanilla else None,
        "cross_entropy": statistics.mean(run["loss"] for run in runs),
        "kinds": {kind: statistics.mean(run["kinds"][kind] for run in runs) for kind in kinds},
        "seeds": {str(run["seed"]): run["accuracy"] for run in runs if run["seed"] is not None},
    }


def measure(clips: Sequence[HeldOut], right: Sequence[Sequence[bool]], losses: Sequence[float]) -> dict[str, Any]:
    """Accuracy over all questions and by kind, and the mean cross-entropy."""
    by_kind: dict[str, list[bool]] = {}
    for clip, answers in zip(clips, right, strict=True):
        for (kind, _, _), ok in zip(clip.questions, answers, strict=True):
            by_kind.setdefault(kind, []).append(ok)
    everything = [ok for answers in right for ok in answers]
    return {
        "accuracy": float(np.mean(everything)),
        "kinds": {kind: float(np.mean(values)) for kind, values in by_kind.items()},
        "loss": float(np.mean(losses)),
    }


def main(args: argparse.Namespace) -> None:
    """Run the table; exits with a message where ratio 1 is not the uncompressed model."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from score_vllm.demo import demo_model

    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = candidates(args.methods, args.policies, args.ranked_share)
    model_path = demo_model() if args.model == "demo" else Path(args.model)
    clips = held_out_clips(model_path, args.split, args.clips, args.questions)
    # One length of question lists per batch keeps batches full.
    clips.sort(key=lambda clip: len(clip.questions))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
    words = Words(AutoTokenizer.from_pretrained(model_path))
    count = sum(len(clip.questions) for clip in clips)

    right, losses, _ = answer(model, words, clips, everything)
    vanilla = measure(clips, right, losses)
    for candidate in chosen[:1] + [c for c in chosen if c.policy is not None][:1]:
        again, _, _ = answer(model, words, clips[:16], partial(candidate.select, ratio=1.0))
        if again != right[:16]:
            raise SystemExit(f"{candidate.name} at ratio 1 does not answer as the uncompressed model does")
    rows = [summarise("vanilla", 1.0, [{**vanilla, "achieved": 1.0, "seed": None}], vanilla["accuracy"])]
    bar = tqdm(total=len(chosen) * len(args.ratios), desc="methods", unit="run")
    names = list(dict.fromkeys(candidate.name for candidate in chosen))
    for ratio in args.ratios:
        for name in names:
            runs = []
            for candidate in (c for c in chosen if c.name == name):
                right, losses, achieved = answer(model, words, clips, partial(candidate.select, ratio=ratio))
                runs.append({**measure(clips, right, losses), "achieved": achieved, "seed": candidate.seed})
                bar.update()
            rows.append(summarise(name, ratio, runs, vanilla["accuracy"]))
    bar.close()
    facts = {"questions": count, "clips": len(clips), "split": args.split, "model": args.model}
    publish("accuracy", args.output, rows, **facts)
