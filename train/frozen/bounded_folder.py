"""Files in a folder within a bound of bytes, the least recently used dropped first; several processes may share it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

SUFFIX = ".safetensors"
# After an eviction this share of the bound is in use.
_AFTER_EVICTION = 0.9


class BoundedFolder:
    """A folder of ``*.safetensors``. Whoever reads one touches it, so that it counts as used.

    Args:
        directory: made with the first file.
        bound: bytes.
    """

    def __init__(self, directory: Path, bound: int) -> None:
        self.directory = directory
        self._bound = bound
        self._bytes: int | None = None

    def put(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill a file aside and rename it to ``path``, in the folder; then drop what is too much."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._bytes is None:
            self._bytes = sum(size for _, size, _ in self._entries())
        handle, name = tempfile.mkstemp(dir=self.directory, prefix=".", suffix=".part")
        os.close(handle)
        try:
            write(Path(name))
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        self._bytes += path.stat().st_size
        if self._bytes <= self._bound:
            return
        # Other processes write here too: look at what is really there.
        entries = sorted(self._entries())
        self._bytes = sum(size for _, size, _ in entries)
        for _, size, old in entries:
            if self._bytes <= self._bound * _AFTER_EVICTION:
                break
            old.unlink(missing_ok=True)
            self._bytes -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self.directory.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found
