"""Random access to the records of a large file: an index of their places, built once, read where needed."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from score_vllm.files import write_atomically
from score_vllm.train.schema import MissingError

log = logging.getLogger(__name__)

# Raise when the same file and settings would give other entries.
INDEX_VERSION = 1
# One entry: (offset, length, part), three int64 in this machine's order.
_ENTRY = 3
_ENTRY_BYTES = 8 * _ENTRY
_FLUSH_ENTRIES = 1 << 16
# Files from here on get a progress bar.
_LONG_BYTES = 32 << 20

Entry = tuple[int, int, int]


class FileReader:
    """Reads pieces of a file; opens it at first use in each process, holds nothing of it, safe in threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, int] | None = None

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``.

        Raises:
            OSError: the file cannot be read, or ends before.
        """
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = (os.getpid(), os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        data = os.pread(opened[1], length, offset)
        if len(data) != length:
            raise OSError(f"{self.path} ends before byte {offset + length}; was it changed?")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def __del__(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            os.close(self._opened[1])


class RecordIndex:
    """Entries ``(offset, length, part)`` of the records of one file, kept on disk."""

    def __init__(self, path: Path) -> None:
        self._reader = FileReader(path)
        self._length = path.stat().st_size // _ENTRY_BYTES

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Entry:
        entry = array("q", self._reader.read(index * _ENTRY_BYTES, _ENTRY_BYTES))
        return entry[0], entry[1], entry[2]


def open_index(data: Path, settings: dict[str, Any], scan: Callable[[], Iterable[Entry]], cache: Path) -> RecordIndex:
    """The index of ``data``, built in one pass where it does not exist yet.

    The index's name comes from the file's path, size and time of change and from ``settings``: other filters, another
    file. It is written aside and renamed; several processes that start at once build it once.

    Args:
        data: the file; its last change is part of the name.
        settings: JSON-able; whatever decides which entries there are.
        scan: makes the entries.
        cache: folder of the index files.

    Returns:
        The index.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: whatever ``scan`` finds wrong.
    """
    state = data.stat()
    identity = [INDEX_VERSION, str(data.resolve()), state.st_size, state.st_mtime_ns, settings]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}.index"
    if not path.exists():
        with FileLock(cache / f"{name}.lock"):
            if not path.exists():
                write_atomically(path, lambda part: _build(part, scan()))
    return RecordIndex(path)


def _build(path: Path, entries: Iterable[Entry]) -> None:
    with path.open("wb") as file:
        buffer = array("q")
        for entry in entries:
            buffer.extend(entry)
            if len(buffer) >= _FLUSH_ENTRIES * _ENTRY:
                buffer.tofile(file)
                del buffer[:]
        buffer.tofile(file)


def with_progress(path: Path, records: Iterable[tuple[int, int, Any]]) -> Iterator[tuple[int, int, Any]]:
    """Pass records on, with a bar over the bytes of a large file."""
    size = path.stat().st_size
    done = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"index {path.name}", disable=size < _LONG_BYTES) as bar:
        for offset, length, record in records:
            bar.update(offset + length - done)
            done = offset + length
            yield offset, length, record


def is_held_out(video: str, fraction: float) -> bool:
    """Whether a video belongs to the held-out split: by a hash of its name, so that every question about it does.

    Args:
        video: what names the video in its dataset.
        fraction: of the videos, in [0, 1).
    """
    digest = hashlib.sha256(video.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def in_split(video: str, split: str, fraction: float) -> bool:
    """Whether a video belongs to ``train``, ``held_out`` or ``all``; an empty split is ``train``."""
    return split == "all" or is_held_out(video, fraction) == (split == "held_out")


def sample_rows(total: int, limit: int, seed: int) -> Sequence[int]:
    """Rows that a ``limit`` leaves: a seeded sample over all of them, ascending; a larger limit only adds rows.

    Args:
        total: rows there are.
        limit: rows to keep; 0, or ``total`` and more, keeps all.
        seed: of the sample.
    """
    if not 0 < limit < total:
        return range(total)
    # Every row has its own random number (SplitMix64 of seed and row); those with the smallest ones are kept.
    mixed = np.arange(total, dtype=np.uint64) + np.uint64((seed << 32) % 2**64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    kept: list[int] = np.sort(np.argpartition(mixed, limit)[:limit]).tolist()
    return kept


def data_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Files that a source's ``path`` means: the file, those of a folder and below it, or those a pattern matches.

    Returns:
        Sorted paths, at least one.

    Raises:
        FileNotFoundError: there is none.
    """
    here = Path(path).expanduser()
    if here.is_file():
        return [here]
    if here.is_dir():
        found = [p for p in here.rglob("*") if p.is_file() and p.suffix in suffixes]
    else:
        found = [p for p in map(Path, glob.glob(str(here), recursive=True)) if p.is_file()]
    if not found:
        raise MissingError(f"source path {path!r}: no file there ending in {' or '.join(suffixes)}")
    return sorted(found)
