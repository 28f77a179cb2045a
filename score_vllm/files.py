"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
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
