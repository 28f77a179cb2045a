"""The blocks of README.md and docs/benchmarks.md. A block is a module of this folder with a function under
:func:`block`:

    @block("ttft_stages", "ttft_stages*.json")
    def ttft_stages(results):                       # {file name: parsed JSON}, sorted; never empty
        document = results["ttft_stages.json"]
        return table([...], [...]) + caption(document, "ttft_stages.json")

and the markers ``<!-- ttft_stages -->`` ... ``<!-- /ttft_stages -->`` on a page. Every module here is imported by
``report.py``; nothing else has to be touched.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import read_results, write_atomically

Render = Callable[[dict[str, Any]], str]
NOT_MEASURED = "*Not measured yet.*"


@dataclass(frozen=True)
class Block:
    """One marked part of a page.

    Attributes:
        name: of the markers.
        pattern: glob of its results files.
        render: results by file name to Markdown.
        picture: makes the PNG of one results file, or None; it stands beside the JSON under the same name.
        empty: Markdown where there is no results file.
    """

    name: str
    pattern: str
    render: Render
    picture: Callable[[dict[str, Any], str], bytes] | None = None
    empty: Callable[[], str] = lambda: NOT_MEASURED


BLOCKS: dict[str, Block] = {}


def block(
    name: str,
    pattern: str,
    *,
    picture: Callable[[dict[str, Any], str], bytes] | None = None,
    empty: Callable[[], str] = lambda: NOT_MEASURED,
) -> Callable[[Render], Render]:
    """Decorator that registers a block; see :class:`Block`.

    Raises:
        ValueError: the name is taken.
    """

    def wrap(render: Render) -> Render:
        if name in BLOCKS and BLOCKS[name].render.__module__ != render.__module__:
            raise ValueError(f"block {name!r} is registered already, by {BLOCKS[name].render.__module__}")
        BLOCKS[name] = Block(name, pattern, render, picture, empty)
        return render

    return wrap


def load_blocks() -> dict[str, Block]:
    """Import every module of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return BLOCKS


def file_digest(path: Path) -> str:
    """SHA-256 of a results file: what its picture was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link(file: str) -> str:
    """A link to a results file, from the root of the repository."""
    return f"[{file}](benchmarks/results/{file})"


def png(figure: Any, digest: str) -> bytes:
    """A matplotlib figure as PNG that names the results it was drawn from."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Results": digest, "Software": None})
    return buffer.getvalue()


def save_picture(results: Path, draw: Callable[[dict[str, Any], str], bytes]) -> None:
    """Draw a results file's picture beside it, or say why there is none."""
    try:
        write_atomically(results.with_suffix(".png"), draw(read_results(results), file_digest(results)))
    except ImportError:
        print("no picture: matplotlib is not installed (extra 'bench')")


def clip_of(document: dict[str, Any]) -> str:
    """The clips of a run in words, from its arguments."""
    return "{frames} frames of {width}x{height}".format(**document["arguments"])
