"""Pseudo-videos of the warm-up from captioned pictures in files, as a run on own clips writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from score_vllm.train.data.clips import decode_picture, fit_within, letterbox
from score_vllm.train.data.config import StillsConfig
from score_vllm.train.data.pseudo import DEFAULT_PROMPT, IMAGES, MERGE, repeat_counts
from score_vllm.train.data.record_index import data_files, in_split, sample_rows
from score_vllm.train.data.record_scan import scan_lines
from score_vllm.train.data.records import parse_object, relative_media
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.schema import ConfigurationError
from score_vllm.video import DecodeLimits


class StillsSource:
    """Samples of a few thousand pictures; sample i begins with picture i.

    Args:
        config: of kind ``stills``.
        merge: frames that the model's vision tower merges into one temporal cell.

    Raises:
        ConfigurationError: no file, a line that cannot be used, or fewer than two pictures.
    """

    def __init__(self, config: StillsConfig, merge: int = MERGE) -> None:
        self.config = config
        self._repeats = repeat_counts(merge)
        self._stills: list[tuple[Path, str]] = []
        for file in data_files(config.path, (".jsonl",)):
            media = Path(config.media).expanduser() if config.media else file.parent
            for offset, _, line in scan_lines(file):
                where = f"{file}@{offset}"
                try:
                    row = parse_object(line, where)
                    name = relative_media(row.get("image"), where)
                except BrokenSampleError as error:
                    raise ConfigurationError(str(error)) from error
                caption = row.get("caption")
                if not isinstance(caption, str) or not caption.strip():
                    raise ConfigurationError(f"{where}: caption must be a non-empty string, got {caption!r}")
                if in_split(str(name), config.split, config.held_out):
                    self._stills.append((media / name, caption.strip()))
        if len(self._stills) < IMAGES[0]:
            raise ConfigurationError(
                f"source path {config.path!r}: {len(self._stills)} pictures, at least 2 are needed"
            )
        self._rows = sample_rows(len(self._stills), config.limit, config.seed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingSample:
        """Sample ``index``.

        Raises:
            BrokenSampleError: a picture cannot be read.
        """
        chosen, rng = self._choose(index)
        pictures = [self._picture(path) for path, _ in chosen]
        size = fit_within(pictures[0].shape[0], pictures[0].shape[1], self.config.max_pixels)
        frames = np.repeat(
            np.stack([letterbox(picture, size) for picture in pictures]), rng.choice(self._repeats, len(chosen)), axis=0
        )
        return TrainingSample(f"{index}:{chosen[0][0].name}", frames, self.config.fps, *self.text(index))

    def text(self, index: int) -> tuple[str, str]:
        """See :class:`~score_vllm.train.data.sample.SampleSource`."""
        chosen, _ = self._choose(index)
        return self.config.prompt or DEFAULT_PROMPT, "\n".join(caption for _, caption in chosen)

    def _choose(self, index: int) -> tuple[list[tuple[Path, str]], np.random.Generator]:
        row = self._rows[index]
        rng = np.random.default_rng([self.config.seed, row])
        others = np.delete(np.arange(len(self._stills)), row)
        count = min(int(rng.integers(IMAGES[0], IMAGES[1] + 1)), len(self._stills))
        return [self._stills[i] for i in (row, *rng.choice(others, count - 1, replace=False))], rng

    @staticmethod
    def _picture(path: Path) -> np.ndarray:
        try:
            return decode_picture(path.read_bytes(), DecodeLimits().max_pixels)
        except (OSError, ValueError) as error:
            raise BrokenSampleError(f"{path}: {error}") from error
