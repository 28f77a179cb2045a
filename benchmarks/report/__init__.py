"""Tables and pictures of the pages, written from results files.

A :class:`Block` says how one kind of results file becomes a table, a caption and perhaps a picture. ``python -m
benchmarks.report`` fills every ``<!-- name -->`` ... ``<!-- /name -->`` of the pages with them, and each benchmark
shows its own results through :func:`publish`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import read_results, table, write_atomically, write_results

Document = dict[str, Any]
Lines = list[list[str]]
NOT_MEASURED = "*Not measured yet.*"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One kind of results file.

    Attributes:
        pattern: glob of its files.
        rows: header and lines of the table.
        caption: in words, with fields of the document in braces; the link to the file is added.
        before, after: paragraphs between table and caption, and after it.
        picture: the document and a digest to the bytes of a PNG, which stands beside the file under its name.
        embed: alternative text of a picture that is shown, and not only linked.
        whole: from all documents by file name, and :meth:`part`, to the block; by default one part after the other.
    """

    pattern: str
    rows: Callable[[Document], tuple[Sequence[str], Lines]]
    caption: str | Callable[[Document], str]
    before: Callable[[Document], str] = lambda _: ""
    after: Callable[[Document], str] = lambda _: ""
    picture: Callable[[Document, str], bytes] | None = None
    embed: str = ""
    whole: Callable[[dict[str, Document], Callable[[Document, str], str]], str] | None = None

    def part(self, document: Document, file: str) -> str:
        """Markdown of one results file."""
        image = f"(benchmarks/results/{Path(file).stem}.png)" if self.picture and "schema" in document else ""
        links = link(file) + (f", [picture]{image}" if image and not self.embed else "")
        words = self.caption.format(**document) if isinstance(self.caption, str) else self.caption(document)
        caption = f"({words}; {links})"
        shown = f"![{self.embed}]{image}" if image and self.embed else ""
        parts = [table(*self.rows(document)), self.before(document), caption, self.after(document), shown]
        return "\n\n".join(part for part in parts if part)

    def render(self, results: dict[str, Document]) -> str:
        """Markdown of all files, by name."""
        if self.whole:
            return self.whole(results, self.part)
        return "\n\n".join(self.part(document, file) for file, document in results.items()) or NOT_MEASURED


def link(file: str) -> str:
    """A link to a results file, from the root of the repository."""
    return f"[{file}](benchmarks/results/{file})"


def load_blocks() -> dict[str, Block]:
    """Every block by the name of its markers."""
    from benchmarks.report import accuracy, footage, leaderboard, prefill, serving, soak, speed, summary

    return (
        accuracy.BLOCKS
        | footage.BLOCKS
        | leaderboard.BLOCKS
        | prefill.BLOCKS
        | speed.BLOCKS
        | serving.BLOCKS
        | soak.BLOCKS
        | summary.BLOCKS
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a results file: what its picture was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(block: Block, path: Path) -> None:
    """Draw the picture of a results file beside it.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    if block.picture:
        write_atomically(path.with_suffix(".png"), block.picture(read_results(path), file_digest(path)))


def publish(name: str, output: Path, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Write a benchmark's results and their picture, and show the block that a page would have."""
    write_results(output, rows, **{"benchmark": name, **facts})
    block = load_blocks()[name]
    try:
        draw(block, output)
    except ImportError:
        print("no picture: matplotlib is not installed (extra 'bench')")
    print(block.part(read_results(output), output.name))
    print(f"written: {os.path.relpath(output)}")
