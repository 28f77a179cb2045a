"""Files in a folder within a bound of bytes, the least recently used dropped first; several processes may share it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

from score_vllm.files import write_atomically

SUFFIX = ".safetensors"
# Shares of the bound: what a process writes between two looks at the folder, and what is in use after an eviction.
_BETWEEN_LOOKS, _AFTER_EVICTION = 0.02, 0.9


class BoundedFolder:
    """A folder of ``*.safetensors``. Whoever reads one touches it, so that it counts as used.

    Each process beyond the first may exceed the bound by 2 %.

    Args:
        directory: made with the first file.
        bound: bytes.
    """

    def __init__(self, directory: Path, bound: int) -> None:
        self.directory = directory
        self._bound = bound
        # By this process since it last looked; others write here too.
        self._written = math.inf

    def put(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill a file aside and rename it to ``path``, in the folder; then drop what is too much."""
        self.directory.mkdir(parents=True, exist_ok=True)

        def measured(part: Path) -> None:
            write(part)
            self._written += part.stat().st_size

        write_atomically(path, measured)
        if self._written < self._bound * _BETWEEN_LOOKS:
            return
        self._written = 0
        entries = sorted(self._entries())
        held = sum(size for _, size, _ in entries)
        # What is written before the next look must fit, too.
        if held <= self._bound * (1 - _BETWEEN_LOOKS):
            return
        for _, size, old in entries:
            if held <= self._bound * _AFTER_EVICTION:
                break
            old.unlink(missing_ok=True)
            held -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        found = []
        # Those with a dot before their name are being written.
        for path in self.directory.glob(f"[!.]*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found
