"""A training sample: one video, what is asked of it, and the answer it should get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class TrainingSample:
    """One video with a prompt and its target response.

    Attributes:
        key: names the sample in logs and caches; stable across runs, unique within a source.
        frames: [F, H, W, 3] uint8 RGB, F >= 1.
        fps: sampled frames per second of video time, > 0; sets the temporal positions.
        prompt: the user's text, without any video placeholder.
        target: the assistant's response, whose cross-entropy is the reward's measure (paper section 4.3).

    Raises:
        ValueError: a field has another shape or dtype, or a text is empty.
    """

    key: str
    frames: np.ndarray
    fps: float
    prompt: str
    target: str

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(
                f"{self.key}: frames must be non-empty [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}"
            )
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"{self.key}: fps must be a finite number > 0, got {self.fps!r}")
        for name, text in (("prompt", self.prompt), ("target", self.target)):
            if not text.strip():
                raise ValueError(f"{self.key}: {name} is empty")


class BrokenSampleError(Exception):
    """A sample that cannot be read: skipped, counted and named by the trainer, never fatal."""


class SampleSource(Protocol):
    """Samples by index, so that a data position is a number, and sharding and resuming are arithmetic.

    ``source[i]`` is deterministic for a given source and raises :class:`BrokenSampleError` with the
    sample's name and the reason where its video or text cannot be used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...

    def text(self, index: int) -> tuple[str, str]:
        """``(prompt, target)`` of a sample, without reading its video; the video may still turn out broken."""


@runtime_checkable
class AskingSource(SampleSource, Protocol):
    """A source whose videos come with questions that have one right answer; training does not use them."""

    def questions(self, index: int) -> Sequence[tuple[str, str, str]]:
        """``(kind, question, answer)`` of each about a sample's video; there may be none."""
