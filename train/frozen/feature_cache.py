"""Visual tokens computed once per sample, kept between epochs in memory or on disk, within a bound."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from score_vllm.layout import VideoLayout
from score_vllm.train.config import CacheSettings
from score_vllm.train.frozen.bounded_folder import SUFFIX, BoundedFolder
from score_vllm.train.frozen.model import EncodedSample

FORMAT = 2
GIB = 1 << 30
_TENSORS = ("x", "prefix", "suffix", "target", "levels")


@dataclasses.dataclass(frozen=True)
class CachedSample:
    """An encoded sample and its cross-entropy under all tokens.

    Attributes:
        encoded: the sample; ``x`` may be on any device.
        ce_base: nats per target token.
    """

    encoded: EncodedSample
    ce_base: float

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self.encoded).values())


class FeatureCache:
    """Encoded samples by key, the least recently used dropped first.

    Args:
        settings: kind, bound and folder.
        namespace: what the features depend on besides the key: the model, its dtype.
        directory: of ``kind="disk"``; several processes may share it.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, settings: CacheSettings, namespace: str, directory: Path) -> None:
        self._kind = settings.kind
        self._bound = int(settings.max_gib * GIB)
        self._namespace = f"{FORMAT}:{namespace}"
        self._folder = BoundedFolder(directory, self._bound)
        self._memory: OrderedDict[str, CachedSample] = OrderedDict()
        self._bytes = 0
        if self._kind == "disk":
            directory.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry; one on disk may still turn out damaged."""
        return key in self._memory or (self._kind == "disk" and self._path(key).is_file())

    def get(self, key: str) -> CachedSample | None:
        """The entry, or None. A damaged file counts as absent and is removed."""
        if self._kind == "memory":
            found = self._memory.get(key)
            if found is not None:
                self._memory.move_to_end(key)
            return found
        if self._kind == "none":
            return None
        path = self._path(key)
        try:
            found = _read(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            return None
        return found

    def put(self, key: str, item: CachedSample) -> None:
        """Keep an entry, unless it alone is above the bound."""
        if self._kind == "none" or item.nbytes > self._bound:
            return
        if self._kind == "disk":
            self._folder.put(self._path(key), lambda part: _write(part, item))
            return
        if (old := self._memory.pop(key, None)) is not None:
            self._bytes -= old.nbytes
        tensors: dict[str, Any] = {name: tensor.cpu() for name, tensor in _tensors(item.encoded).items()}
        encoded = dataclasses.replace(item.encoded, **tensors)
        self._memory[key] = dataclasses.replace(item, encoded=encoded)
        self._bytes += item.nbytes
        while self._bytes > self._bound:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(f"{self._namespace}\n{key}".encode()).hexdigest()[:32]
        return self._folder.directory / f"{digest}{SUFFIX}"


def _tensors(encoded: EncodedSample) -> dict[str, torch.Tensor]:
    """Those that it has."""
    return {name: tensor for name in _TENSORS if (tensor := getattr(encoded, name)) is not None}


def _write(path: Path, item: CachedSample) -> None:
    facts = {"key": item.encoded.key, "ce_base": item.ce_base}
    # Clones: safetensors refuses tensors that share memory.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _tensors(item.encoded).items()}
    save_file({**tensors, "layout": item.encoded.layout.to_tensor()}, path, metadata={"facts": json.dumps(facts)})


def _read(path: Path) -> CachedSample:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    layout = VideoLayout.from_tensor(tensors.pop("layout"))
    return CachedSample(EncodedSample(key=facts["key"], layout=layout, **tensors), facts["ce_base"])
