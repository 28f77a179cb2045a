"""One streaming pass over an annotation file: where each record lies, and what it says."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from score_vllm.train.schema import ConfigurationError

# A record larger than this is a broken file, not a record.
MAX_RECORD_BYTES = 64 << 20
# Fields of a csv file: far above any caption, and a bound on what one lost quote can swallow.
MAX_FIELD_CHARS = 1 << 20
_CHUNK = 1 << 20


def scan_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Non-blank lines of a file.

    Yields:
        ``(offset, length, line)`` in bytes.

    Raises:
        ValueError: a line longer than ``MAX_RECORD_BYTES``.
    """
    with path.open("rb") as file:
        offset = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise ConfigurationError(f"{path}: the line at byte {offset} is longer than {MAX_RECORD_BYTES} bytes")
            if line.strip():
                yield offset, len(line), line
            offset += len(line)


def scan_json_array(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Elements of a file that holds one JSON array; memory holds one element and a chunk.

    Yields:
        ``(offset, length, element)``; offset and length in bytes.

    Raises:
        ValueError: no array, damaged, cut off, or an element above ``MAX_RECORD_BYTES``; the message names the byte.
    """
    decoder = json.JSONDecoder()
    # Surrogates stand for bytes that are not UTF-8, so that lengths in bytes stay true.
    to_text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with path.open("rb") as file:
        text, start, offset, ended = "", 0, 0, False

        def more() -> bool:
            nonlocal text, start, ended
            if ended:
                return False
            chunk = file.read(_CHUNK)
            ended = not chunk
            text, start = text[start:] + to_text.decode(chunk, ended), 0
            return True

        def skip(characters: str) -> str:
            """Pass over such characters; the next one, or '' at the end of the file."""
            nonlocal start, offset
            while True:
                while start < len(text) and text[start] in characters:
                    start, offset = start + 1, offset + len(text[start].encode("utf-8", "surrogateescape"))
                if start < len(text):
                    return text[start]
                if not more():
                    return ""

        if skip("\ufeff \t\r\n") != "[":
            raise ConfigurationError(f"{path} must hold one JSON array ('[' expected at byte {offset})")
        start, offset = start + 1, offset + 1
        separators = " \t\r\n"
        while (first := skip(separators)) != "]":
            if not first:
                raise ConfigurationError(f"{path} is cut off: the array is not closed at byte {offset}")
            while True:
                try:
                    element, end = decoder.raw_decode(text, start)
                    # A number could go on in the next chunk; what ends with a bracket or a quote cannot.
                    closed = text[start] in '{["' or text[end : end + 1] in separators + ",]"
                    if (closed and end < len(text)) or len(text) - start > MAX_RECORD_BYTES or not more():
                        break
                except (json.JSONDecodeError, RecursionError) as error:
                    if len(text) - start > MAX_RECORD_BYTES:
                        raise ConfigurationError(
                            f"{path}: no JSON element ends within {MAX_RECORD_BYTES} bytes"
                        ) from error
                    if not more():
                        raise ConfigurationError(
                            f"{path}: damaged or cut off in the element at byte {offset}"
                        ) from error
            length = len(text[start:end].encode("utf-8", "surrogateescape"))
            yield offset, length, element
            start, offset = end, offset + length
            if (mark := skip(" \t\r\n")) not in (",", "]", ""):
                raise ConfigurationError(f"{path}: ',' or ']' expected at byte {offset}, got {mark!r}")
            if mark == ",":
                start, offset = start + 1, offset + 1


def scan_csv(path: Path) -> Iterator[tuple[int, int, list[str] | None]]:
    """Rows of a csv file, its header among them; quoted fields may hold commas and line ends.

    Yields:
        ``(offset, length, fields)``; offset and length in bytes; None where no row can be made out.
    """
    with path.open("rb") as file:
        consumed = 0

        def lines() -> Iterator[str]:
            nonlocal consumed
            while line := file.readline(MAX_FIELD_CHARS):
                text = line.decode("utf-8-sig" if consumed == 0 else "utf-8", "replace")
                consumed += len(line)
                yield text

        # Nothing else may see the wider limit, and generators stop between rows: it is set for each row.
        reader = csv.reader(lines())
        while True:
            start = consumed
            try:
                with _wide_fields():
                    row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield start, consumed - start, None
                continue
            if row:
                yield start, consumed - start, row


def parse_csv_row(data: bytes) -> list[str]:
    """Fields of one row, as :func:`scan_csv` found it.

    Raises:
        ValueError: it is no row.
    """
    text = data.decode("utf-8-sig", "replace")
    try:
        with _wide_fields():
            return next(csv.reader(line + "\n" for line in text.split("\n")), [])
    except csv.Error as error:
        raise ValueError(f"not a csv row: {error}") from error


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    before = csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)
