"""A few named tensors out of a published checkpoint, without reading the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory; empty where there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def weight_map(directory: Path) -> dict[str, str]:
    """File of each tensor of a safetensors checkpoint, with or without an index.

    Raises:
        FileNotFoundError: no safetensors weights are there.
        ValueError: the index or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = directory / INDEX
    if index.is_file():
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors weights: {error!r}") from error
        return {str(name): str(file) for name, file in found.items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has neither {INDEX} nor a .safetensors file")
    names: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names |= dict.fromkeys(opened.keys(), file.name)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    return names


def read_tensors(directory: Path, wanted: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """The tensors that are asked for, in float32.

    Args:
        directory: of a checkpoint.
        wanted: the key to return a tensor under, by its name in the checkpoint; None leaves it unread.

    Returns:
        Tensors by key; empty where none is wanted.

    Raises:
        FileNotFoundError: there are no weights, or a file of the index is missing.
        ValueError: a file is damaged, or a tensor has values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[tuple[str, str]]] = {}
    for name, file in weight_map(directory).items():
        if (key := wanted(name)) is not None:
            by_file.setdefault(file, []).append((name, key))
    tensors: dict[str, torch.Tensor] = {}
    for file, pairs in by_file.items():
        path = directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{directory / INDEX} names {file}, which is not there")
        try:
            with safe_open(path, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(name).float() for name, key in pairs}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, key in pairs:
            if broken := int((~tensors[key].isfinite()).sum()):
                number = tensors[key].numel()
                raise ValueError(f"{path}: {name} has {broken} of {number} values that are NaN or infinite")
    return tensors


def digest(tensors: Mapping[str, torch.Tensor], settings: str = "") -> str:
    """SHA-256 of settings and of the tensors' names, shapes and values in their order; 16 hexadecimal digits."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in tensors.items():
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
