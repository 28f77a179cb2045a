"""Write the tables of README.md and docs/, and the pictures, from benchmarks/results/*.json.

    python -m benchmarks.report            # rewrite what is out of date
    python -m benchmarks.report --check    # change nothing; print a diff and exit 1 where something is

A block stands between ``<!-- name -->`` and ``<!-- /name -->``, on any page; the modules of this folder say what is in
it. A block without results says so. Results of a block that has no place on any page are an error.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

from PIL import Image

from benchmarks.harness import RESULTS, read_results, script_parser, write_atomically
from benchmarks.report import Block, draw, file_digest, load_blocks

ROOT = RESULTS.parents[1]
# Not the mark of a block of code that a test runs.
MARKER = re.compile(r"^<!-- (/?)(?!run )([a-z0-9_]+) -->$", re.MULTILINE)


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def spans(text: str, page: str) -> dict[str, tuple[int, int]]:
    """Where the content of each marked block begins and ends.

    Raises:
        ValueError: a marker without its partner, nested, or twice.
    """
    found: dict[str, tuple[int, int]] = {}
    markers = list(MARKER.finditer(text))
    for opened, closed in zip(markers[::2], [*markers[1::2], None], strict=False):
        name = opened[2]
        if closed is None or opened[1] or not closed[1] or closed[2] != name or name in found:
            raise ValueError(f"{page}: marker {opened[0]} has no partner, is nested, or stands there twice")
        found[name] = opened.end() + 1, closed.start()
    return found


def render_blocks(results: Path, blocks: dict[str, Block]) -> dict[str, str]:
    """Every block from the results.

    Raises:
        ValueError: results are unreadable, or lack what the block shows.
    """
    written = {}
    for name, block in blocks.items():
        documents = {file.name: read_results(file) for file in sorted(results.glob(block.pattern))}
        try:
            written[name] = block.render(documents)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"block {name}: results lack what it shows: {error!r}") from error
    return written


def fill(text: str, page: Path, written: dict[str, str]) -> str:
    """A page with its blocks; marked blocks that nobody writes are left as they are."""
    # Blocks link from the root; pages in docs/ are one folder below it (a clone may be called docs, too).
    below = page.parent.name == "docs" and page.name != "README.md"
    up = "](../benchmarks/" if below else "](benchmarks/"
    parts, cursor = [], 0
    for name, (start, stop) in spans(text, page.name).items():
        if name in written:
            parts += [text[cursor:start], written[name].rstrip().replace("](benchmarks/", up), "\n"]
            cursor = stop
    return "".join([*parts, text[cursor:]])


def picture_source(path: Path) -> str | None:
    """The digest of the results that a picture was drawn from; None where there is no picture, or no digest in it."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Results")


def stale_pictures(results: Path, blocks: dict[str, Block]) -> list[tuple[Path, Block]]:
    """Results files whose picture is missing or was drawn from other results."""
    return [
        (file, block)
        for block in blocks.values()
        for file in (sorted(results.glob(block.pattern)) if block.picture else [])
        # Files without a schema have no picture.
        if "schema" in read_results(file) and picture_source(file.with_suffix(".png")) != file_digest(file)
    ]


def run(args: argparse.Namespace) -> int:
    """Check or write; see :func:`main`."""
    blocks = load_blocks()
    old = {page: page.read_text(encoding="utf-8") for page in args.pages}
    written = render_blocks(args.results, blocks)
    new = {page: fill(text, page, written) for page, text in old.items()}
    for name, block in blocks.items():
        if any(args.results.glob(block.pattern)) and not any(f"<!-- {name} -->" in text for text in old.values()):
            raise ValueError(f"no page has <!-- {name} --> ... <!-- /{name} -->, and there are results for it")
    stale = stale_pictures(args.results, blocks)
    changed = [page for page in args.pages if old[page] != new[page]]
    if args.check:
        for page in changed:
            texts = old[page].splitlines(True), new[page].splitlines(True)
            names = f"{page.name} as it is", f"{page.name} from the results"
            sys.stdout.writelines(difflib.unified_diff(*texts, *names))
        for file, _ in stale:
            print(f"{file.with_suffix('.png').name} is missing or was not drawn from {file.name}")
        return int(bool(changed or stale))
    for file, block in stale:
        draw(block, file)
    for page in changed:
        write_atomically(page, new[page].encode())
    for path in [*changed, *(file.with_suffix(".png") for file, _ in stale)]:
        print(f"written: {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """0 where all agrees (or has been written), 1 where ``--check`` found a difference, 2 where something is wrong."""
    parser = script_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page or a picture is old")
    parser.add_argument("--pages", type=Path, nargs="+", metavar="FILE", help="default: README.md and docs/*.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    args = parser.parse_args(argv)
    args.pages = args.pages or pages()
    try:
        return run(args)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
    except ImportError as error:
        print(f"no pictures: {error} (extra 'bench')", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
