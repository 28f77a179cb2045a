"""Write the tables of README.md and docs/benchmarks.md, and the pictures, from benchmarks/results/*.json.

    python benchmarks/report.py            # rewrite what is out of date
    python benchmarks/report.py --check    # change nothing; print a diff and exit 1 where something is

A block stands between ``<!-- name -->`` and ``<!-- /name -->``; what writes it is a function in report_blocks/. A block
without results says so. Results of a block that has no place on any page are an error.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import RESULTS, check_results, write_atomically
from report_blocks import Block, file_digest, load_blocks

ROOT = RESULTS.parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
MARKER = re.compile(r"^<!-- (/?)([a-z0-9_]+) -->$", re.MULTILINE)


class ReportError(Exception):
    """A page or the results cannot be used; the message says where and why."""


def read(path: Path) -> dict[str, Any]:
    """A results file; one with an ``environment`` is checked against the harness's schema.

    Raises:
        ReportError: not JSON, or not of the schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("must hold a JSON object")
        return check_results(document) if "environment" in document else document
    except (OSError, ValueError) as error:
        raise ReportError(f"{path.name}: {error}") from error


def spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the content of each marked block begins and ends.

    Raises:
        ReportError: a marker without its partner, nested, or twice.
    """
    found: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for match in MARKER.finditer(text):
        closes, name = bool(match[1]), match[2]
        if closes != (opened is not None) or (opened is not None and opened[2] != name) or name in found:
            raise ReportError(f"marker {match[0]} has no partner, is nested, or stands there twice")
        if opened is not None:
            found[name] = opened.end() + 1, match.start()
        opened = None if closes else match
    if opened is not None:
        raise ReportError(f"marker {opened[0]} has no partner, is nested, or stands there twice")
    return found


def render(texts: dict[Path, str], results: Path, blocks: dict[str, Block]) -> dict[Path, str]:
    """The pages as the results have them.

    Args:
        texts: page to its text; marked blocks that nobody registered are left as they are.
        results: folder of the results files.
        blocks: by name.

    Raises:
        ReportError: markers are broken, results are unreadable or lack what the block shows, or have no place.
    """
    written: dict[str, str] = {}
    for name, block in blocks.items():
        files = sorted(results.glob(block.pattern))
        if not any(f"<!-- {name} -->" in text for text in texts.values()):
            if files:
                raise ReportError(f"no <!-- {name} --> ... <!-- /{name} --> on any page for {files[0].name}")
            continue
        try:
            written[name] = block.render({file.name: read(file) for file in files}) if files else block.empty()
        except (KeyError, TypeError, IndexError) as error:
            raise ReportError(f"block {name}: results lack what it shows: {error!r}") from error
    rendered = {}
    for page, text in texts.items():
        parts, cursor = [], 0
        try:
            places = spans(text)
        except ReportError as error:
            raise ReportError(f"{page.name}: {error}") from error
        # Blocks link from the root of the repository; every page but the README is one folder below it.
        up = "](" if page.name == "README.md" else "](../"
        for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
            if name in written:
                content = re.sub(r"\]\((?=benchmarks/)", up, written[name].rstrip())
                parts += [text[cursor:start], content + "\n"]
                cursor = stop
        rendered[page] = "".join([*parts, text[cursor:]])
    return rendered


def picture_source(path: Path) -> str | None:
    """The digest of the results that a picture was drawn from, out of its PNG text; None where there is none."""
    if not path.is_file():
        return None
    data, place = path.read_bytes(), 8
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        if kind == b"tEXt" and content.startswith(b"Results\0"):
            return content.split(b"\0", 1)[1].decode("latin-1")
        place += 12 + length
    return None


def stale_pictures(results: Path, blocks: dict[str, Block]) -> list[tuple[Path, Block]]:
    """Results files whose picture is missing or was drawn from other results."""
    stale = []
    for block in blocks.values():
        for file in sorted(results.glob(block.pattern)) if block.picture else []:
            # Files older than the schema were written before there were pictures.
            if "schema" in read(file) and picture_source(file.with_suffix(".png")) != file_digest(file):
                stale.append((file, block))
    return stale


def main(argv: list[str] | None = None) -> int:
    """0 where all agrees (or has been written), 1 where ``--check`` found a difference, 2 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page or a picture is old")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    blocks = load_blocks()
    try:
        old = {page: page.read_text(encoding="utf-8") for page in args.pages}
        new = render(old, args.results, blocks)
        stale = stale_pictures(args.results, blocks)
        if args.check:
            for page in args.pages:
                names = f"{page.name} as it is", f"{page.name} from the results"
                before, after = old[page].splitlines(True), new[page].splitlines(True)
                sys.stdout.writelines(difflib.unified_diff(before, after, *names))
            for file, _ in stale:
                print(f"{file.with_suffix('.png').name} is missing or was not drawn from {file.name}")
            return int(old != new or bool(stale))
        for file, block in stale:
            assert block.picture is not None
            write_atomically(file.with_suffix(".png"), block.picture(read(file), file_digest(file)))
            print(f"written: {file.with_suffix('.png')}")
        for page in args.pages:
            if old[page] != new[page]:
                write_atomically(page, new[page].encode())
                print(f"written: {page}")
    except (OSError, ReportError) as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"no pictures: {error} (extra 'bench')", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
