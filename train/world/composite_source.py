"""Composite clips painted over footage, as a source of training samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from score_vllm.train.data.sample import TrainingSample
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.world.composite import (
    CLASSES,
    COLOURS,
    FPS,
    GRID,
    NUM_FRAMES,
    PATCH,
    PLATE,
    SIZE,
    Composite,
    caption,
    make_composite,
    questions,
)
from score_vllm.train.world.footage import FOLDER, backgrounds
from score_vllm.train.world.footage_items import PARTS
from score_vllm.train.world.render import plate, shape_mask
from score_vllm.train.world.scenes import CAPTION_PROMPTS, Question, clip_rng

# Pixels of a patch that a figure must cover to be what the patch shows.
MIN_COVER = 14


@dataclass(frozen=True)
class Painted:
    """frames: [F, SIZE, SIZE, 3] uint8 RGB; shown: [F, GRID, GRID] uint8, the class that each patch shows; came: the
    same shape, bool, whether that is an event."""

    frames: np.ndarray
    shown: np.ndarray
    came: np.ndarray


def view(frames: np.ndarray, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A look at a background: a crop of a clip at some pace, there and back where it is short, or a way over a photo.

    Args:
        frames: [n, h, w, 3] uint8; n = 1 is a photograph.
        num_frames: F.
        rng: consumed.

    Returns:
        [F, SIZE, SIZE, 3] uint8.
    """
    count, height, width = frames.shape[:3]
    sides = rng.uniform(min(SIZE, height, width), min(height, width), 2)
    starts = rng.uniform(0, 1, (2, 2))
    if count > 1:
        sides[1], starts[1] = sides[0], starts[0]
    step = int(rng.integers(1, 5)) if count > 1 else 0
    at = int(rng.integers(count)) + step * np.arange(num_frames)
    at = at % max(1, 2 * count - 2)
    at = np.where(at < count, at, 2 * count - 2 - at)
    if rng.random() < 0.5:
        at = at[::-1]
    flip = rng.random() < 0.5
    out = np.empty((num_frames, SIZE, SIZE, 3), np.uint8)
    for number, share in enumerate(np.linspace(0, 1, num_frames)):
        side = sides[0] + share * (sides[1] - sides[0])
        left, top = (starts[0] + share * (starts[1] - starts[0])) * (width - side, height - side)
        box = (left, top, left + side, top + side)
        picture = Image.fromarray(np.asarray(frames[at[number]])).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
        out[number] = np.asarray(picture)[:, ::-1] if flip else np.asarray(picture)
    return out


def paint(scene: Composite, frames: Mapping[str, np.ndarray]) -> Painted:
    """Paint a clip.

    Args:
        scene: any.
        frames: backgrounds by name, [n, h, w, 3] uint8 each; its own must be among them.
    """
    rng = np.random.default_rng(scene.seed)
    out = view(frames[scene.background], scene.num_frames, rng).copy()
    seen = np.zeros((scene.num_frames, SIZE, SIZE), np.uint8)
    event = np.zeros((scene.num_frames, SIZE, SIZE), bool)
    figures = [*((f, False) for f in scene.clutter), *((f, True) for f in (*scene.things, *scene.flashes))]
    for figure, comes in figures:
        if figure.colour:
            mask = shape_mask(figure.look, figure.size)
            shade = np.array(COLOURS[figure.colour]) + rng.integers(-12, 13, 3)
            ink = np.broadcast_to(np.clip(shade, 0, 255).astype(np.uint8), (figure.size, figure.size, 3))
        else:
            mask, ink = np.ones((PLATE, PLATE), bool), plate(figure.look, PLATE)
        for start, stop in figure.spans:
            for frame in range(start, stop):
                x, y = figure.box(frame)
                where = frame, slice(y, y + figure.size), slice(x, x + figure.size)
                out[where][mask] = ink[mask]
                seen[where][mask] = figure.label
                event[where][mask] = comes
    tiles = seen.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, PATCH * PATCH)
    counts = np.stack([(tiles == label).sum(1) for label in range(1, CLASSES)], axis=1)
    shown = np.where(counts.max(1) >= MIN_COVER, counts.argmax(1) + 1, 0).astype(np.uint8)
    covered = event.reshape(-1, GRID, PATCH, GRID, PATCH).sum((2, 4)) >= MIN_COVER
    return Painted(out, shown.reshape(-1, GRID, GRID), covered)


@dataclass(frozen=True)
class CompositeSource:
    """Composite clips with their captions as :class:`~score_vllm.train.data.sample.SampleSource`.

    Attributes:
        split: names of :data:`PARTS` have their backgrounds, any other those of ``policy``.
        size: number of clips.
        path: folder that :mod:`score_vllm.train.world.footage` filled.
        num_frames: of each clip, at least 16.
        clutter: look-alikes a clip; None: up to four.
    """

    split: str = "policy"
    size: int = 10_000
    path: str = FOLDER
    num_frames: int = NUM_FRAMES
    clutter: int | None = None

    @classmethod
    def for_training(cls, split: str, size: int, path: str) -> CompositeSource:
        """A source for policies.

        Raises:
            ConfigurationError: the split is the evaluation's or the reader's.
            MissingError: the footage is.
        """
        if split in ("held_out", "reader"):
            raise ConfigurationError(f"split {split!r} is not for policies: choose 'policy', or another name")
        source = cls(split, size, path)
        backgrounds(path, source.part)
        return source

    @property
    def part(self) -> str:
        """Whose backgrounds it has."""
        return self.split if self.split in PARTS else "policy"

    @property
    def names(self) -> list[str]:
        """Backgrounds to choose from, each as often as it has parts of the whole: clips and photographs half each."""
        names = [item.name for item in PARTS[self.part]]
        photos = [name for name in names if name.startswith("photo-")]
        clips = [name for name in names if name not in photos]
        return clips * max(1, len(photos)) + photos * max(1, len(clips))

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> tuple[Composite, list[Question]]:
        """Clip ``index`` before it is painted, and its questions."""
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        rng = clip_rng(self.split, index, "composite")
        scene = make_composite(rng, self.names, self.num_frames, self.clutter)
        return scene, questions(scene, rng)

    def painted(self, index: int) -> Painted:
        """Its pictures."""
        return paint(self.scene(index)[0], backgrounds(self.path, self.part))

    def questions(self, index: int) -> list[tuple[str, str, str]]:
        """See :class:`~score_vllm.train.data.sample.AskingSource`."""
        return [(q.kind, q.text, q.answer) for q in self.scene(index)[1]]

    def text(self, index: int) -> tuple[str, str]:
        """Prompt and caption of a clip, without painting it."""
        return CAPTION_PROMPTS[0], caption(self.scene(index)[0])

    def __getitem__(self, index: int) -> TrainingSample:
        """The clip as training sees it."""
        return TrainingSample(f"composite:{self.split}:{index}", self.painted(index).frames, FPS, *self.text(index))
