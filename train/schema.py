"""Validated settings: pydantic models from TOML tables, and one sentence for what is wrong with one."""

from __future__ import annotations

import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from score_vllm.near_miss import near_miss

T = TypeVar("T")
_WORDS = {"int": "an integer", "float": "a number", "string": "a string", "bool": "true or false", "tuple": "a list"}


class ConfigurationError(ValueError):
    """The user's mistake, in settings, model, data or output: its message is the one sentence that is printed."""


class MissingError(ConfigurationError, FileNotFoundError):
    """A file, folder or package that the settings name is not there."""

    def __str__(self) -> str:
        return str(self.args[0])


class Settings(BaseModel):
    """A table: unknown keys, wrong types and numbers that are not finite are refused.

    Messages of validators begin with the field's name; :func:`build` puts the table's name in front.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, ser_json_inf_nan="null")


def build(kind: Any, table: Any, where: str = "") -> Any:
    """Validate a table.

    Args:
        kind: a :class:`Settings` class or a union of them.
        table: the mapping.
        where: dotted name of the table, for messages.

    Raises:
        ValueError: one sentence with the dotted name, the value and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(table)
    except ValidationError as error:
        raise ConfigurationError(_sentence(kind, error.errors()[0], where)) from None


def _sentence(kind: Any, error: Any, where: str) -> str:
    names, field, inside = _resolve(kind, error["loc"])
    name = ".".join(([where] if where else []) + names)
    value, problem = error["input"], error["type"]
    if problem == "value_error":
        return ".".join(filter(None, (name, str(error["ctx"]["error"]))))
    if problem == "extra_forbidden":
        known = sorted(f.alias or n for n, f in inside.model_fields.items())
        return f"unknown key {name!r}{near_miss(names[-1], known)}; known: {known}"
    if problem == "missing":
        return f"{name} is missing{_allowed(field)}"
    if problem.startswith("union_tag"):
        known = sorted(error["ctx"].get("expected_tags", "").replace("'", "").split(", ")) if value else []
        tag = error["ctx"].get("tag")
        if tag is None:
            return f"{name or 'the table'} lacks the key 'kind'"
        return f"{name}{'.' if name else ''}kind must be one of {known}, got {tag!r}{near_miss(tag, known)}"
    if problem in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name or 'the configuration'} must be a table, got {value!r}"
    if problem in ("too_short", "string_too_short"):
        return f"{name} must be non-empty, got {value!r}"
    choices = typing.get_args(field.annotation) if problem == "literal_error" else ()
    if choices:
        return f"{name} must be one of {list(choices)}, got {value!r}{near_miss(value, choices)}"
    word = _WORDS.get(problem.removesuffix("_type"), "a number" if field.annotation is float else "an integer")
    return f"{name} must be {word}{_allowed(field)}, got {value!r}"


def _resolve(kind: Any, location: tuple[Any, ...]) -> tuple[list[str], Any, Any]:
    """Dotted name of an error's place (without the tags of unions), its field, and the model around that."""
    names: list[str] = []
    field: Any = None
    inside: Any = None
    for step in location:
        options = [m for m in _members(kind) if isinstance(m, type) and issubclass(m, BaseModel)]
        if len(options) > 1 and isinstance(step, str):  # a tag
            kind = next(m for m in options if step in typing.get_args(m.model_fields["kind"].annotation))
            continue
        names.append(str(step))
        if options:
            inside = options[0]
            field = next((f for n, f in inside.model_fields.items() if step in (n, f.alias)), None)
            kind = field.annotation if field else None
        else:  # a list or a table of tables
            kind = next((m for m in typing.get_args(kind) if m not in (str, Ellipsis)), None)
    options = [m for m in _members(kind) if isinstance(m, type) and issubclass(m, BaseModel)]
    return names, field, inside or (options[0] if options else None)


def _members(kind: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _members(typing.get_args(kind)[0])
    return typing.get_args(kind) if origin in (typing.Union, type(int | str)) else (kind,)


def _allowed(field: Any) -> str:
    """Range of a number field as `` in [low, high]``; nothing where there is none."""
    limits = {n: v for m in field.metadata for n in ("gt", "ge", "lt", "le") if (v := getattr(m, n, None)) is not None}
    if not limits:
        return ""
    low = f"({limits['gt']}" if "gt" in limits else f"[{limits.get('ge', '-inf')}"
    high = f"{limits['le']}]" if "le" in limits else f"{limits.get('lt', 'inf')})"
    return f" in {low}, {high}"


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not TOML; the message has the line.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingError(f"configuration file {str(path)!r} does not exist")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error


def parse_override(text: str, option: str = "--set") -> tuple[list[str], Any]:
    """``a.b=value`` to its path and value; a value that is not TOML is a string.

    Raises:
        ValueError: no ``=`` or an empty name.
    """
    name, sign, raw = text.partition("=")
    path = name.strip().split(".")
    if not sign or not all(path):
        raise ConfigurationError(f"{option} takes KEY=VALUE with a dotted key, got {text!r}")
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
                raise ConfigurationError(f"{'.'.join(path)}: {step!r} must be an index in [0, {len(table) - 1}]")
            key: Any = int(step)
        elif isinstance(table, dict):
            key = step
            if not last:
                table.setdefault(step, {})
        else:
            raise ConfigurationError(f"{'.'.join(path)}: {'.'.join(path[:depth])!r} is not a table")
        if last:
            table[key] = value
        else:
            table = table[key]
