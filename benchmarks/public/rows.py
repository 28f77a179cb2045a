"""Rows of parquet, JSON and JSON-lines files, and checks of their fields that name file, row and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any


class FormatError(ValueError):
    """A file is not what it should be; the message names the file, the row and the field."""


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a parquet file, a JSON array or a JSON-lines file, each with its place in words.

    Raises:
        FormatError: the file does not exist, has another extension, or is not of its format.
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{path}: line {number}", _parse(line, f"{path}: line {number}")
        elif path.suffix == ".json":
            rows = _parse(path.read_text(encoding="utf-8"), str(path))
            if not isinstance(rows, list):
                raise FormatError(f"{path}: must hold one JSON array of rows, got {type(rows).__name__}")
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
        else:
            raise FormatError(f"{path}: must end in .parquet, .json or .jsonl")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FormatError(f"{path}: reading parquet needs pyarrow: pip install 'score-vllm[bench]'") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not a readable parquet file: {error}") from error
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


class Row:
    """One row, whose fields are taken with a check each; every error names the place and the field."""

    def __init__(self, where: str, row: Any) -> None:
        if not isinstance(row, dict):
            raise FormatError(f"{where}: must be an object with fields, got {type(row).__name__}")
        self.where, self.row = where, row

    def error(self, field: str, problem: str) -> FormatError:
        return FormatError(f"{self.where}: field {field!r} {problem}")

    def get(self, field: str) -> Any:
        if self.row.get(field) is None:
            raise self.error(field, f"is missing; the row has {sorted(map(str, self.row))}")
        return self.row[field]

    def text(self, field: str) -> str:
        value = self.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids and counts are written as numbers here and there
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"must be a non-empty string, got {value!r}")
        return value

    def choice(self, field: str, allowed: tuple[str, ...]) -> str:
        value = self.text(field)
        if value not in allowed:
            raise self.error(field, f"must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def texts(self, field: str) -> list[str]:
        value = self.get(field)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"must be a non-empty list, got {value!r}")
        return [Row(self.where, {f"{field}[{i}]": item}).text(f"{field}[{i}]") for i, item in enumerate(value)]

    def video(self, field: str) -> str:
        """A relative path that stays below the videos' root."""
        value = self.text(field)
        if PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
            raise self.error(field, f"must be a relative path without '..', got {value!r}")
        return value
