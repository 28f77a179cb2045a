"""Dataclasses from TOML tables, with every key and value checked against what its field declares."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def bounded(default: float, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A number field in [low, high], or (low, high] with ``above``."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def choice(default: str, names: Iterable[str]) -> Any:
    """A string field that is one of ``names``."""
    return field(default=default, metadata={"choices": tuple(names)})


def build(cls: type[T], table: Any, where: str = "") -> T:
    """Make a dataclass from a table; fields of other kinds than numbers, strings and dataclasses pass unchecked.

    Args:
        cls: a dataclass whose fields are int, float, str, bool, or such dataclasses.
        table: the mapping.
        where: dotted name of the table, for messages.

    Raises:
        ValueError: an unknown key, a missing key, a wrong type, or a value out of range; the message has the dotted
            name, the value and what is allowed.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where or 'the configuration'} must be a table, got {table!r}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {_join(where, key)!r}{near_miss(key, known)}; known: {sorted(known)}")
    hints = get_type_hints(cls)
    values = {}
    for name, value in table.items():
        kind = hints[name]
        if is_dataclass(kind) and isinstance(kind, type):
            values[name] = value if isinstance(value, kind) else build(kind, value, _join(where, name))
        elif kind in _WORDS:
            values[name] = _scalar(kind, value, known[name].metadata, _join(where, name))
        else:
            values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where or 'the configuration'}: {error}") from error


def _scalar(kind: Any, value: Any, limits: Any, name: str) -> Any:
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {_WORDS[kind]}{_range(limits)}, got {value!r}")
    if kind is float:
        value = float(value)
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{name} must be{_range(limits)}, got {value!r}{near_miss(value, limits['choices'])}")
    if "low" in limits:
        inside = value > limits["low"] if limits["above"] else value >= limits["low"]
        # Written so that NaN is outside.
        if not (inside and value <= limits["high"] and math.isfinite(value)):
            raise ValueError(f"{name} must be {_WORDS[kind]}{_range(limits)}, got {value!r}")
    return value


def _range(limits: Any) -> str:
    if "choices" in limits:
        return f" one of {list(limits['choices'])}"
    if "low" in limits:
        opening = "(" if limits["above"] else "["
        closing = ")" if math.isinf(limits["high"]) else "]"
        return f" in {opening}{limits['low']}, {limits['high']}{closing}"
    return ""


def near_miss(name: Any, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where something known is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not TOML; the message has the line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"configuration file {str(path)!r} does not exist")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` to its path and value; a value that is not TOML is a string.

    Raises:
        ValueError: no ``=`` or an empty name.
    """
    name, sign, raw = text.partition("=")
    path = name.strip().split(".")
    if not sign or not all(path):
        raise ValueError(f"--set takes NAME=VALUE with a dotted name, got {text!r}")
    try:
        return path, tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return path, raw.strip()


def assign(table: Any, path: list[str], value: Any) -> None:
    """Set one entry of nested tables and lists in place; missing tables are made.

    Raises:
        ValueError: the path goes through something that is neither, or a list index is out of range.
    """
    for depth, step in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(table, list):
            if not step.isdigit() or int(step) >= len(table):
                raise ValueError(f"{'.'.join(path)}: {step!r} must be an index in [0, {len(table) - 1}]")
            key: Any = int(step)
        elif isinstance(table, dict):
            key = step
            if not last:
                table.setdefault(step, {})
        else:
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[:depth])!r} is not a table")
        if last:
            table[key] = value
        else:
            table = table[key]


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
