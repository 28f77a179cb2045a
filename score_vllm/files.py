"""Files and folders that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place.

    Args:
        path: of the file; an earlier one is replaced.
        write: gets a path of the same suffix in the same folder, which must exist.
    """
    part = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        # With the rights of any new file, which those of the tempfile module do not have.
        part.touch(exist_ok=False)
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def may_replace(folder: Path, record: str) -> bool:
    """Whether a folder holds nothing that is not ours: it is not there, is empty, or has the file ``record``."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / record).is_file() or not any(folder.iterdir()))


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A path beside ``folder`` to make and fill, which takes its place where nothing is raised, and is removed else.

    Args:
        folder: its parent must exist; an earlier one goes when the new one is in its place.
    """
    staging, old = (folder.with_name(f".{folder.name}-{secrets.token_hex(8)}") for _ in range(2))
    try:
        yield staging
        if folder.exists():
            old.mkdir()
            os.replace(folder, old / folder.name)
        os.replace(staging, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
