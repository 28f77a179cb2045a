"""Accuracy on held-out questions about real footage, for every method and policy, at every ratio, in one run.

    python benchmarks/accuracy.py --benchmark footage --reader runs/reader --policies runs/footage-policies

Events pasted on clips that neither the reader nor any policy has seen, tokens of a frozen DINOv2, and a small reader of
them: see docs/real_footage.md for what that says of a 7B. Methods read the tokens as they are and standardised per
channel; the better of the two is in the table. Differences are paired, with standard errors over clips and over
backgrounds. The run refuses a reader that answers less than 20 points more with all tokens than with none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import publish
from benchmarks.world.accuracy import (
    Candidate,
    HeldOut,
    Select,
    add_world_arguments,
    answer,
    candidates,
    everything,
    measure,
    summarise,
)
from score_vllm.train.world.composite import GRID
from score_vllm.train.world.composite_source import CompositeSource
from score_vllm.train.world.dinov2 import FootageEncoder
from score_vllm.train.world.language_stage import Words
from score_vllm.train.world.reader import FootageVLM, is_reader, record_of
from score_vllm.train.world.reader_stage import GATE, T_FACTORS
from score_vllm.types import VideoGrid

# Choose blindly: standardising changes nothing.
BLIND = ("random", "uniform")
LEAST_QUESTIONS, LEAST_BACKGROUNDS = 1000, 6


@dataclass(frozen=True)
class Reader:
    """A trained reader, ready to be asked."""

    engine: FootageVLM
    words: Words

    def ask(self, clips: Sequence[HeldOut], select: Select, batch: int = 8) -> dict[str, Any]:
        """Accuracy, kinds, loss and kept share; ``right`` has the number of right answers of every clip."""
        how = {"project": self.engine.projector, "t_factor": T_FACTORS[0]}
        right, losses, achieved = answer(self.engine.model, self.words, clips, select, batch, **how)
        return {
            **measure(clips, right, losses),
            "achieved": achieved,
            "right": np.array([sum(answers) for answers in right]),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the footage benchmark."""
    parser.add_argument(
        "--reader", type=Path, default=Path("runs/reader"), help="of score_vllm.train.world.reader_stage"
    )
    parser.add_argument("--reference", default="budget-matched", help="family that the others are compared with")
    add_world_arguments(parser, "0.4,0.25,0.1,0.05", 240, "accuracy_footage.json")


def open_reader(path: Path) -> Reader:
    """Load a reader.

    Raises:
        SystemExit: there is none.
    """
    if not is_reader(path):
        make = f"python -m score_vllm.train.world.reader_stage --output {path}"
        raise SystemExit(f"error: --reader {path} is no reader; to train one: {make}")
    engine = FootageVLM.from_pretrained(path)
    assert isinstance(engine, FootageVLM)
    return Reader(engine, Words(engine.tokenizer))


def footage_clips(encoder: FootageEncoder, source: CompositeSource, per_clip: int) -> list[HeldOut]:
    """Encoded clips of a source, those with as many questions beside each other."""
    found = []
    for index in tqdm(range(len(source)), desc=f"{source.split} clips", unit="clip"):
        scene, asked = source.scene(index)
        features = encoder.encode(source.painted(index).frames)
        chosen = tuple((q.kind, q.text, q.answer) for q in asked[:per_clip])
        grid = VideoGrid(len(features.x), GRID, GRID)
        found.append(HeldOut(features.x.float(), features.saliency, grid, chosen, scene.background))
    return sorted(found, key=lambda clip: len(clip.questions))


def nothing(clip: HeldOut) -> tuple[torch.Tensor, torch.Tensor]:
    """No token: what the questions alone give away."""
    rows, indices = everything(clip)
    return rows[:0], indices[:0]


def paired(one: np.ndarray, other: np.ndarray, clips: Sequence[HeldOut]) -> dict[str, float | None]:
    """Difference of two accuracies on the same questions, in points, with its standard errors.

    Args:
        one, other: right answers of every clip [C], means over seeds where there are some.
        clips: C of them.

    Returns:
        ``difference``, ``se_clips`` (clips drawn anew), ``se_backgrounds`` (backgrounds drawn anew; None where
        there is only one).
    """
    counts = np.array([len(clip.questions) for clip in clips])
    gained = 100 * (one - other)
    names = np.array([clip.background for clip in clips])
    means = [gained[names == name].sum() / counts[names == name].sum() for name in dict.fromkeys(names.tolist())]
    return {
        "difference": float(gained.sum() / counts.sum()),
        "se_clips": float(gained.std(ddof=1) / len(clips) ** 0.5 / counts.mean()),
        "se_backgrounds": float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
    }


def by_background(right: np.ndarray, clips: Sequence[HeldOut]) -> dict[str, float]:
    """Accuracy on each background."""
    found: dict[str, list[float]] = {}
    for clip, hits in zip(clips, right, strict=True):
        found.setdefault(clip.background, []).append(hits)
    counts = {name: sum(len(c.questions) for c in clips if c.background == name) for name in found}
    return {name: float(sum(hits) / counts[name]) for name, hits in sorted(found.items())}


def best_of(reader: Reader, clips: Sequence[HeldOut], candidate: Candidate, ratio: float) -> dict[str, Any]:
    """The better run of a training-free method on tokens as they are and on standardised ones."""
    found = {"raw": reader.ask(clips, partial(candidate.select, ratio=ratio))}
    if candidate.method not in BLIND:
        projector = reader.engine.projector
        scaled = replace(candidate, channels=(projector.mean, projector.scale))
        found["standardised"] = reader.ask(clips, partial(scaled.select, ratio=ratio))
    inputs = max(found, key=lambda name: found[name]["accuracy"])
    return {**found[inputs], "inputs": inputs, "seed": None}


def table(
    reader: Reader, clips: Sequence[HeldOut], chosen: Sequence[Candidate], asked: Sequence[float], reference: str
) -> list[dict[str, Any]]:
    """A row per candidate and ratio, with what it gains over vanilla, the best method without training, and the
    reference family."""
    vanilla = reader.ask(clips, everything)
    blind = reader.ask(clips, nothing)
    if vanilla["accuracy"] < blind["accuracy"] + GATE:
        raise SystemExit(
            f"the reader answers {vanilla['accuracy']:.1%} with all tokens and {blind['accuracy']:.1%} with none: "
            f"less than {GATE:.0%} apart"
        )
    first = summarise("vanilla", 1.0, [{**vanilla, "seed": None}], vanilla["accuracy"])
    rows = [
        {
            **first,
            "backgrounds": by_background(vanilla["right"], clips),
            "blind": {"accuracy": blind["accuracy"], "kinds": blind["kinds"]},
        }
    ]
    names = list(dict.fromkeys(candidate.name for candidate in chosen))
    bar = tqdm(total=len(chosen) * len(asked), desc="methods", unit="run")
    for ratio in asked:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for candidate in chosen:
            if candidate.policy is None:
                runs[candidate.name].append(best_of(reader, clips, candidate, ratio))
            else:
                run = reader.ask(clips, partial(candidate.select, ratio=ratio))
                runs[candidate.name].append({**run, "seed": candidate.seed})
            bar.update()
        right = {name: np.mean([run["right"] for run in mine], axis=0) for name, mine in runs.items()}
        free = [name for name in names if runs[name][0]["seed"] is None]
        best = max(free, key=lambda name: runs[name][0]["accuracy"], default=None)
        for name in names:
            row = summarise(name, ratio, runs[name], vanilla["accuracy"])
            against = {"vanilla": paired(right[name], vanilla["right"], clips)}
            if best is not None and best != name:
                against[best] = paired(right[name], right[best], clips)
            if reference in right and reference != name and row["seeds"]:
                against[reference] = paired(right[name], right[reference], clips)
            row |= {"inputs": runs[name][0].get("inputs", "raw"), "best_free": best, "against": against}
            rows.append({**row, "backgrounds": by_background(right[name], clips)})
    bar.close()
    return rows


def main(args: argparse.Namespace) -> None:
    """Run the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.monotonic()
    chosen = candidates(args.methods, args.policies, args.ranked_share)
    reader = open_reader(args.reader)
    record = record_of(args.reader)
    clips = footage_clips(
        reader.engine.encoder, CompositeSource(args.split, args.clips, record["footage"]), args.questions
    )
    encoded = time.monotonic()
    count, grounds = sum(len(clip.questions) for clip in clips), {clip.background for clip in clips}
    if args.split == "held_out" and (count < LEAST_QUESTIONS or len(grounds) < LEAST_BACKGROUNDS):
        print(f"warning: {count} questions on {len(grounds)} backgrounds say little")
    rows = table(reader, clips, chosen, args.ratios, args.reference)
    facts = {
        "questions": count,
        "clips": len(clips),
        "backgrounds": sorted(grounds),
        "split": args.split,
        "reference": args.reference,
        "reader": {key: value for key, value in record.items() if key != "footage"},
        "seconds": {"clips": round(encoded - started, 1), "answers": round(time.monotonic() - encoded, 1)},
    }
    publish("accuracy_footage", args.output, rows, **facts)
