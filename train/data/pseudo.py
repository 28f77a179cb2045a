"""Pseudo-videos of the warm-up (paper section 4.4): a few captioned images, each held for a few frames."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from score_vllm.demo import cache_directory
from score_vllm.train.data.clips import decode_picture, fit_within, letterbox
from score_vllm.train.data.config import OneVisionConfig
from score_vllm.train.data.record_index import Entry, RecordIndex, data_files, in_split, open_index, sample_rows
from score_vllm.train.data.records import pairs_of, relative_media
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.schema import ConfigurationError, MissingError
from score_vllm.video import DecodeLimits

IMAGES = (2, 4)
REPEATS = (3, 6)
MERGE = 2
DEFAULT_PROMPT = "Describe the scenes of this video one after the other."
# Companions of an image come from its window of rows: what is read for a sample stays small in any row group.
WINDOW_ROWS = 256
_WINDOWS_TRIED = 4
_IMAGE_BATCH = 16
# Files of so many rows get a progress bar.
_LONG_ROWS = 100_000
_COLUMNS = ("id", "conversations", "image")


@dataclass(frozen=True)
class _Row:
    """A row without its picture: where it is, its name, its caption, and what makes it unusable ('' if nothing)."""

    group: int
    at: int
    name: str
    caption: str
    broken: str


class OneVisionPseudoSource:
    """Pseudo-videos from LLaVA-OneVision-Data's parquet files.

    Every sample begins with the image of its row, followed by one to three other images of nearby rows
    (windows of 256 within a row group), drawn by seed and row; each is held as :func:`repeat_counts` says. A row
    without image or without an answer by gpt is a broken sample, and never drawn as a companion. All images of a
    clip are brought to the size of the first by letterboxing: their shape is kept, the rest is black. The captions
    (each conversation's first answer) are joined by line ends.

    Only file footers are held; a split other than ``all`` reads the id column once.

    Args:
        config: of kind ``onevision-pseudo``.
        merge: frames that the model's vision tower merges into one temporal cell.

    Raises:
        FileNotFoundError: no data file, or no media folder.
        ValueError: a file is no parquet file or lacks a column, or no row is left.
    """

    def __init__(self, config: OneVisionConfig, merge: int = MERGE) -> None:
        self.config = config
        self._repeats = repeat_counts(merge)
        if config.media and not Path(config.media).expanduser().is_dir():
            raise MissingError(f"source media {config.media!r} is not a folder")
        root = Path(config.path).expanduser()
        cache = Path(config.cache).expanduser() if config.cache else cache_directory() / "index"
        self._files = [_ParquetFile(path) for path in self._select(data_files(config.path, (".parquet",)))]
        self._names = [
            f.path.relative_to(root).as_posix() if root in f.path.parents else f.path.name for f in self._files
        ]
        self._rows: list[RecordIndex | range] = []
        for file in self._files:
            if config.split == "all" or (config.split in ("", "train") and not config.held_out):
                self._rows.append(range(file.num_rows))
                continue
            settings = {"kind": config.kind, "split": config.split or "train", "held_out": config.held_out}
            self._rows.append(open_index(file.path, settings, lambda file=file: self._entries(file), cache))  # type: ignore[misc]
        self._ends = list(accumulate(len(rows) for rows in self._rows))
        self._sample = sample_rows(self._ends[-1], config.limit, config.seed)
        if not len(self):
            raise ConfigurationError(
                f"source path {config.path!r}: no row is left in split {config.split or 'train'!r}"
            )

    def __len__(self) -> int:
        return len(self._sample)

    def _select(self, paths: list[Path]) -> list[Path]:
        """Files in the folders of the wanted subsets; a single file that ``path`` names in any case."""
        wanted, root = self.config.subsets, Path(self.config.path).expanduser()
        if "all" in wanted or root.is_file():
            return paths
        chosen = [p for p in paths if p.parent.name in wanted]
        if not chosen:
            there = sorted({p.parent.name for p in paths})
            raise ConfigurationError(
                f"source path {self.config.path!r}: no folder of it is one of subsets = {list(wanted)}; there are "
                f"{there[:10]}; name others, or ['all']"
            )
        return chosen

    def __getitem__(self, index: int) -> TrainingSample:
        """Sample ``index``; ``fps`` is the source's.

        Raises:
            BrokenSampleError: the row's image or text cannot be used, or there is no companion; names the row.
            IndexError: ``index`` is outside [0, len).
        """
        file, name, number, rng = self._locate(index)
        import pyarrow as pa

        try:
            return self._make(file, f"{name}#{number}", number, rng)
        except (OSError, pa.ArrowException) as error:  # a file that is gone, a damaged page
            raise BrokenSampleError(f"{name}#{number}: {error}") from error

    def text(self, index: int) -> tuple[str, str]:
        """Prompt and joined captions of a sample whose pictures can all be decoded."""
        file, name, number, rng = self._locate(index)
        group, at = file.place(number)
        window = file.window(group, at // WINDOW_ROWS)
        anchor = next(row for row in window if row.at == at)
        if anchor.broken:
            raise BrokenSampleError(f"{name}#{number}:{anchor.name}: {anchor.broken}")
        count = int(rng.integers(IMAGES[0], IMAGES[1] + 1))
        others = itertools.islice(self._companions(file, anchor, window, rng), count - 1)
        return self.config.prompt or DEFAULT_PROMPT, "\n".join([anchor.caption, *(row.caption for row in others)])

    def _locate(self, index: int) -> tuple[_ParquetFile, str, int, np.random.Generator]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample index must be in [0, {len(self)}), got {index}")
        row = self._sample[index]
        at = bisect.bisect_right(self._ends, row)
        entry = self._rows[at][row - (self._ends[at - 1] if at else 0)]
        number = entry if isinstance(entry, int) else entry[0]
        return self._files[at], self._names[at], number, np.random.default_rng([self.config.seed, row])

    def _make(self, file: _ParquetFile, where: str, row_number: int, rng: np.random.Generator) -> TrainingSample:
        group, at = file.place(row_number)
        window = file.window(group, at // WINDOW_ROWS)
        anchor = next(row for row in window if row.at == at)
        key = f"{where}:{anchor.name}"
        if anchor.broken:
            raise BrokenSampleError(f"{key}: {anchor.broken}")
        count = int(rng.integers(IMAGES[0], IMAGES[1] + 1))
        first = self._picture(file.image(anchor), key)
        size = fit_within(first.shape[0], first.shape[1], self.config.max_pixels)
        stills, captions = [letterbox(first, size)], [anchor.caption]
        for row in self._companions(file, anchor, window, rng):
            try:
                picture = self._picture(file.image(row), row.name)
            except BrokenSampleError:
                continue  # broken as a sample of its own; here another one takes its place
            stills.append(letterbox(picture, size))
            captions.append(row.caption)
            if len(stills) == count:
                break
        if len(stills) < IMAGES[0]:
            raise BrokenSampleError(f"{key}: no second usable image in the rows around it")
        repeats = rng.choice(self._repeats, len(stills))
        frames = np.repeat(np.stack(stills), repeats, axis=0)
        prompt = self.config.prompt or DEFAULT_PROMPT
        return TrainingSample(key, frames, self.config.fps, prompt, "\n".join(captions))

    def _companions(
        self, file: _ParquetFile, anchor: _Row, window: list[_Row], rng: np.random.Generator
    ) -> Iterator[_Row]:
        """Usable rows of the same split in random order: the window's, then those of the windows after it."""
        split, held_out = self.config.split, self.config.held_out
        place = (anchor.group, anchor.at // WINDOW_ROWS)
        begin = place
        for _ in range(_WINDOWS_TRIED):
            for i in rng.permutation(len(window)):
                row = window[i]
                if not row.broken and row != anchor and in_split(row.name, split, held_out):
                    yield row
            place = file.next_window(*place)
            if place == begin:
                return
            window = file.window(*place)

    def _picture(self, image: dict[str, Any] | None, name: str) -> np.ndarray:
        data = image.get("bytes") if image else None
        try:
            if not data:
                if not (image and image.get("path") and self.config.media):
                    raise BrokenSampleError(f"{name}: the image has no bytes")
                data = (Path(self.config.media).expanduser() / relative_media(image["path"], name)).read_bytes()
            return decode_picture(data, DecodeLimits().max_pixels)
        except ValueError as error:
            raise BrokenSampleError(f"{name}: {error}") from error
        except OSError as error:
            raise BrokenSampleError(f"{name}: cannot read the image: {error.strerror or error}") from error

    def _entries(self, file: _ParquetFile) -> Iterator[Entry]:
        few = file.num_rows < _LONG_ROWS
        ids = tqdm(file.ids(), total=file.num_rows, unit="row", desc=f"index {file.path.name}", disable=few)
        for number, value in enumerate(ids):
            if in_split(value, self.config.split, self.config.held_out):
                yield number, 0, 0


def repeat_counts(merge: int) -> list[int]:
    """For how many frames a still may be held: of the paper's 3 to 6 the multiples of the model's temporal merge.

    No cell then blends two stills, so that the residual within a still is zero (paper section 4.4, figure 4).

    Args:
        merge: frames per temporal cell, >= 1.
    """
    return [n for n in range(REPEATS[0], REPEATS[1] + 1) if n % merge == 0] or [merge]


class _ParquetFile:
    """Rows of one parquet file by number; opened anew for each read, from the footer kept here."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self.path = path
        try:
            with parquet.ParquetFile(path) as file:
                self._metadata = file.metadata
                missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
                image: Any = None if missing else file.schema_arrow.field("image").type
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigurationError(f"{path} is not a parquet file: {' '.join(str(error).split())[:200]}") from error
        if missing:
            raise ConfigurationError(f"{path} lacks the columns {missing}; it must hold {list(_COLUMNS)}")
        if not pa.types.is_struct(image) or {"bytes", "path"} - {f.name for f in image}:
            raise ConfigurationError(f"{path}: column image must be a struct of bytes and path, got {image}")
        self._ends = list(
            accumulate(self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups))
        )

    @property
    def num_rows(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, row: int) -> tuple[int, int]:
        """``(row group, row within it)``."""
        group = bisect.bisect_right(self._ends, row)
        return group, row - (self._ends[group - 1] if group else 0)

    def next_window(self, group: int, window: int) -> tuple[int, int]:
        """The window after this one, the file's first after its last."""
        rows = self._ends[group] - (self._ends[group - 1] if group else 0)
        if (window + 1) * WINDOW_ROWS < rows:
            return group, window + 1
        return (group + 1) % len(self._ends), 0

    def window(self, group: int, window: int) -> list[_Row]:
        """Rows of a window without their pictures."""
        begin, end = window * WINDOW_ROWS, (window + 1) * WINDOW_ROWS
        found = []
        for at, raw in self._read(group, ["id", "conversations", "image.path"], WINDOW_ROWS, begin, end):
            pairs = pairs_of(raw["conversations"])
            caption = pairs[0][1] if pairs else ""
            broken = "" if caption else "no answer by gpt to a human's turn"
            broken = "no image" if raw["image"] is None else broken
            found.append(_Row(group, at, str(raw["id"]), caption, broken))
        return found

    def image(self, row: _Row) -> dict[str, Any] | None:
        """``{"bytes", "path"}`` of a row."""
        ((_, raw),) = self._read(row.group, ["image.bytes", "image.path"], _IMAGE_BATCH, row.at, row.at + 1)
        return raw["image"]

    def ids(self) -> Iterator[str]:
        """Values of the id column."""
        for group in range(len(self._ends)):
            for _, raw in self._read(group, ["id"], 1 << 14, 0, 1 << 62):
                yield str(raw["id"])

    def _read(self, group: int, columns: list[str], batch: int, begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """Rows [begin, end) of a row group; the pages before them pass through a small buffer."""
        from pyarrow import parquet

        # Not pre-buffered: that would hold a whole row group's pictures. No threads: loaders fork.
        options: dict[str, Any] = {"metadata": self._metadata, "pre_buffer": False, "buffer_size": 1 << 20}
        with parquet.ParquetFile(self.path, **options) as file:
            at = 0
            for table in file.iter_batches(batch, row_groups=[group], columns=columns, use_threads=False):
                low, high = max(begin - at, 0), min(end - at, table.num_rows)
                if low < high:
                    yield from enumerate(table.slice(low, high - low).to_pylist(), at + low)
                at += table.num_rows
                if at >= end:
                    return
