"""A method's trained tensors out of a checkpoint on the hub, by byte ranges: megabytes instead of the whole model."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from score_vllm.methods.checkpoints import INDEX, SINGLE

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# A safetensors header of more is no header.
MAX_HEADER_BYTES = 100 << 20
BLOCK = 1 << 20
SOURCE = "source.json"


@dataclass(frozen=True, slots=True)
class _Range:
    """Where one tensor lies in a file of the repository."""

    name: str
    file: str
    start: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def is_hub_id(source: str) -> bool:
    """True for ``owner/name`` that is no directory here."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).is_dir()


def fetch(repo: str, directory: Path, wanted: Callable[[str], str | None], revision: str | None = None) -> Path:
    """Copy the tensors that a method needs from a repository of the hub into a directory of their own.

    Interrupted, it goes on where it stopped: finished bytes stay in ``directory`` under ``.part`` names. Only the
    headers, the config and the tensors' own bytes are read, with a progress bar.

    Args:
        repo: ``owner/name``.
        directory: made, or taken as it is where the same revision was fetched completely before. Files of another
            fetch are replaced, no others.
        wanted: not None for the names of tensors to fetch.
        revision: branch, tag or commit; None: the default branch.

    Returns:
        ``directory``, with ``model.safetensors``, ``config.json`` where the repository has one, and ``source.json``.

    Raises:
        OSError: the hub cannot be reached, or the repository does not exist or is not open to you.
        ValueError: the repository has no such tensors, or they are damaged; or ``directory`` holds other files.
    """
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if held and SOURCE not in held and not any(name.endswith(".part") for name in held):
        raise ValueError(f"{directory} holds other files: give a directory of its own")
    from huggingface_hub import HfApi, HfFileSystem
    from safetensors.torch import save_file

    with _reworded(repo):
        commit = HfApi().model_info(repo, revision=revision).sha
        if _source(directory).get("commit") == commit and (directory / SINGLE).is_file():
            return directory
        root = f"{repo}@{commit}"
        fs = HfFileSystem(skip_instance_cache=True)
        files = {Path(path).name for path in fs.ls(root, detail=False)}
        ranges = [
            place for file, names in _files(fs, root, files, wanted).items() for place in _locate(fs, root, file, names)
        ]
        if not ranges:
            raise ValueError(f"{repo} holds no tensors of this method")
        directory.mkdir(parents=True, exist_ok=True)
        config = json.loads(fs.cat_file(f"{root}/config.json")) if "config.json" in files else None
        total = sum(place.length for place in ranges)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"tensors of {repo}") as bar:
            tensors = {
                place.name: _read(fs, root, place, directory / f"{commit}.{place.name}.part", bar) for place in ranges
            }
    partial = directory / f"{SINGLE}.part"
    save_file(tensors, partial, metadata={"format": "pt"})
    if config is not None:
        _write(directory / "config.json", config)
    os.replace(partial, directory / SINGLE)
    _write(directory / SOURCE, {"repo": repo, "commit": commit})
    for left in directory.glob("*.part"):
        left.unlink()
    return directory


@contextmanager
def _reworded(repo: str) -> Iterator[None]:
    """The hub's errors as one sentence each."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise OSError(f"cannot fetch {repo}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _bytes(fs: Any, path: str, start: int, stop: int) -> bytes:
    # Without a cache, which would read ahead by megabytes.
    with fs.open(path, "rb", cache_type="none") as file:
        file.seek(start)
        return bytes(file.read(stop - start))


def _source(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _files(fs: Any, root: str, files: set[str], wanted: Callable[[str], str | None]) -> dict[str, list[str] | None]:
    """The weight files to look into, and which tensors of each; None: every wanted one."""
    if INDEX not in files:
        return {file: None for file in sorted(files) if file.endswith(".safetensors")}
    try:
        mapped = json.loads(fs.cat_file(f"{root}/{INDEX}"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{root}/{INDEX} is not an index of safetensors weights: {error!r}") from error
    by_file: dict[str, list[str] | None] = {}
    for name, file in mapped.items():
        if wanted(name) is not None:
            names = by_file.setdefault(file, [])
            assert names is not None
            names.append(name)
    return by_file


def _locate(fs: Any, root: str, file: str, names: list[str] | None) -> list[_Range]:
    """Byte ranges of the tensors of a safetensors file, from its header."""
    path = f"{root}/{file}"
    size = int(fs.info(path)["size"])
    (length,) = struct.unpack("<Q", _bytes(fs, path, 0, 8)) if size >= 8 else (size,)
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{path} is not a safetensors file: its header would have {length} bytes")
    try:
        header = json.loads(_bytes(fs, path, 8, 8 + length))
        found = []
        for name in header if names is None else names:
            if name == "__metadata__":
                continue
            entry = header[name]
            begin, end = entry["data_offsets"]
            place = _Range(name, file, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
            found.append(place)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the header of {path} is damaged: {error!r}") from error
    for place in found:
        count = int(torch.Size(place.shape).numel())
        if place.dtype not in DTYPES or count * DTYPES[place.dtype].itemsize != place.length:
            raise ValueError(f"{path}: {place.name} is {place.dtype} {list(place.shape)} in {place.length} bytes")
        if place.start + place.length > size:
            raise ValueError(f"{path} ends before {place.name} does")
    return found


def _read(fs: Any, root: str, place: _Range, partial: Path, bar: Any) -> torch.Tensor:
    """One tensor, going on after what ``partial`` holds already."""
    done = min(partial.stat().st_size, place.length) if partial.exists() else 0
    bar.update(done)
    with partial.open("ab") as sink:
        sink.truncate(done)
        while done < place.length:
            stop = min(done + BLOCK, place.length)
            block = _bytes(fs, f"{root}/{place.file}", place.start + done, place.start + stop)
            if len(block) != stop - done:
                raise OSError(f"the hub sent {len(block)} bytes of {place.file} where {stop - done} were asked for")
            sink.write(block)
            sink.flush()
            done = stop
            bar.update(len(block))
    data = bytearray(partial.read_bytes())
    return torch.frombuffer(data, dtype=DTYPES[place.dtype]).reshape(place.shape).clone()
