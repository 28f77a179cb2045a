"""A frozen model whose best mask is known, and a runner for tests that need a process of their own.

Usage: train_toy.py CONFIG [train's own options]; TOY_SLEEP slows the model down, TOY_KILL_AT_SAVE=N kills the process
with SIGKILL while it saves step N, TOY_CRASH=1 makes the model raise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from score_vllm.layout import grid_layout
from score_vllm.train import checkpoint
from score_vllm.train.__main__ import make_accelerator, parse
from score_vllm.train.config import load_settings
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen.model import EncodedSample
from score_vllm.train.stopping import TrainingStoppedError
from score_vllm.train.trainer import Trainer
from score_vllm.types import VideoGrid

GRID = VideoGrid(4, 4, 4)
WIDTH = 8
IMPORTANT = 16

CONFIG = """
output = "{output}"
seed = 5
[model]
device = "cpu"
[optimizer]
lr = 0.01
[checkpoint]
every = 4
keep = 2
[tracking]
tracker = "none"
progress = false
[stage.warmup]
steps = 6
tau = 1.01
[[stage.warmup.sources]]
kind = "world"
[stage.main]
steps = 6
[[stage.main.sources]]
kind = "world"
"""


def write_config(folder: Path, name: str = "run") -> Path:
    """A configuration whose output is ``folder/name``."""
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(output=folder / name))
    return path


def tokens_of(key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x, important)``: [T, N, D] float32 and [T * N] bool. Important tokens are marked in their first channel."""
    generator = torch.Generator().manual_seed(int(key))
    x = 0.5 * torch.randn(GRID.num_tokens, WIDTH, generator=generator)
    important = torch.zeros(GRID.num_tokens, dtype=torch.bool)
    important[torch.randperm(GRID.num_tokens, generator=generator)[:IMPORTANT]] = True
    x[:, 0] += torch.where(important, 1.0, -1.0)
    return x.view(GRID.t, GRID.tokens_per_frame, WIDTH), important


class ToyEngine:
    """Cross-entropy is 1 plus half the share of important tokens that are missing."""

    hidden_size = WIDTH
    architecture = "Toy"
    identity = "toy"

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.base_calls = 0

    def encode(self, sample: TrainingSample) -> EncodedSample:
        self.encoded.append(sample.key)
        ids = torch.arange(3)
        return EncodedSample(sample.key, tokens_of(sample.key)[0], grid_layout(GRID, 1.0), ids, ids, ids)

    def cross_entropy(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        self.base_calls += len(kept) == 1
        if os.environ.get("TOY_CRASH"):
            raise RuntimeError("a shape is wrong, on purpose")
        if pause := os.environ.get("TOY_SLEEP"):
            time.sleep(float(pause))
        important = tokens_of(encoded.key)[1]
        missing = torch.stack([1 - important[k].sum() / IMPORTANT for k in kept])
        return 1 + 0.5 * missing

    def finish_step(self) -> None:
        """Nothing is shared."""


class ToySource:
    """Eleven samples; those in ``broken`` cannot be read."""

    def __init__(self, size: int = 11, broken: Sequence[int] = ()) -> None:
        self.size, self.broken = size, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> TrainingSample:
        self.read.append(index)
        if index in self.broken:
            raise BrokenSampleError(f"{index}: unreadable on purpose")
        return TrainingSample(str(index), np.zeros((8, 28, 28, 3), np.uint8), 2.0, "What?", "That.")

    def text(self, index: int) -> tuple[str, str]:
        return "What?", "That."


def toy_sources(source: ToySource | None = None) -> dict[str, ToySource]:
    """The same samples for both stages."""
    return dict.fromkeys(("warmup", "main"), source or ToySource())


def main() -> int:
    torch.set_num_threads(1)
    options = parse(["--config", *sys.argv[1:]])
    if number := os.environ.get("TOY_KILL_AT_SAVE"):
        sync = checkpoint._sync

        def kill(path: Path) -> None:
            if path.name == checkpoint.STATE_FILE and path.parent.name.startswith(f".step-{number}-"):
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        checkpoint._sync = kill
    settings = load_settings(options.config, options.overrides)
    trainer = Trainer(settings, ToyEngine(), make_accelerator(settings), toy_sources())
    try:
        return trainer.run(only=options.stage, resume=options.resume)
    except TrainingStoppedError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
