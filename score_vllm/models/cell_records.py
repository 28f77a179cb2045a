"""How many cells of each video the tower encoded, from the worker to the API process that answers for the video.

A worker owns a ring of (number, ticket, cells) rows in a file and is its only writer. The ticket was drawn where the
video was processed, so that nobody else asks for it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np

_ROWS = 4096
_COLUMNS = 3
_PATTERN = "cells-{}.i64"


def draw_ticket() -> int:
    """A name for one processed video, above 0."""
    return secrets.randbits(62) + 1


class EncodedCellsWriter:
    """A worker's side.

    Args:
        directory: where the file of this process goes; None keeps the rows in this process.
    """

    def __init__(self, directory: str | None) -> None:
        self._ring = np.zeros((_ROWS, _COLUMNS), dtype=np.int64)
        self._written = 0
        if directory is not None:
            path = Path(directory) / _PATTERN.format(os.getpid())
            self._ring = np.memmap(path, dtype=np.int64, mode="w+", shape=self._ring.shape)

    def write(self, ticket: int, encoded: int) -> None:
        """Say that so many cells of a video were encoded; the oldest row makes place."""
        row = self._ring[self._written % _ROWS]
        self._written += 1
        row[0] = 0  # nobody reads a row that is half written
        row[1:] = ticket, encoded
        row[0] = self._written


class EncodedCellsReader:
    """An API process's side.

    Args:
        directory: the one given to the workers.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._taken: dict[tuple[str, int], None] = {}

    def take(self, ticket: int) -> int:
        """Cells encoded for a video since the last call; requests at once for one video share what was encoded once."""
        encoded = 0
        paths = list(self._directory.glob(_PATTERN.format("*")))
        for path in paths:
            rows = np.fromfile(path, dtype=np.int64).reshape(-1, _COLUMNS)
            for number, _, cells in rows[(rows[:, 1] == ticket) & (rows[:, 0] > 0)].tolist():
                if (path.name, number) not in self._taken:
                    self._taken[path.name, number] = None
                    encoded += cells
        while len(self._taken) > _ROWS * len(paths):  # older than any row
            self._taken.pop(next(iter(self._taken)))
        return encoded
