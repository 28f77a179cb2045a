"""Training state on disk: safetensors and JSON, whole or absent, the newest few kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from score_vllm.train.schema import ConfigurationError

logger = logging.getLogger(__name__)

FORMAT = 1
POLICY_FILE = "policy.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, besides its tensors. Rollouts and data order follow from seed and slot: no generator's
    state needs saving.

    Attributes:
        step: optimiser steps over all stages.
        stage: name of the current stage.
        stage_step: optimiser steps within it.
        samples_per_step: over all processes; slots are counted with it.
        collapse_streak: see :class:`score_vllm.train.stopping.CollapseWatch`.
        settings: the configuration, as :meth:`TrainSettings.to_dict`.
        provenance: see :func:`score_vllm.train.provenance.provenance`.
        digests: SHA-256 of the tensor files by name.
        format: of this folder.
    """

    step: int
    stage: str
    stage_step: int
    samples_per_step: int
    collapse_streak: int
    settings: dict[str, Any]
    provenance: dict[str, Any]
    digests: dict[str, str]
    format: int = FORMAT


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """Every tensor of an optimiser's state as ``<parameter>.<entry>``, on the CPU.

    Args:
        optimizer: with one group of parameters.
        names: of those parameters, in its order.
    """
    found = {}
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        for entry, value in optimizer.state[parameter].items():
            if value is not None:
                found[f"{name}.{entry}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`.

    Raises:
        ValueError: an entry belongs to no parameter.
    """
    parameters = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))
    for full, value in tensors.items():
        name, _, entry = full.rpartition(".")
        if name not in parameters:
            raise ValueError(f"{OPTIMIZER_FILE} holds {full!r}; the policy's parameters are {names}")
        # AdamW keeps its step count on the CPU.
        device = value.device if entry == "step" else parameters[name].device
        optimizer.state[parameters[name]][entry] = value.to(device)


def save_checkpoint(
    root: Path, policy: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: TrainState, keep: int
) -> Path:
    """Write ``root/step-N``; it appears whole or not at all. Older ones beyond ``keep`` are removed after that.

    Args:
        root: made where missing.
        policy: weights by name.
        optimizer: from :func:`optimizer_tensors`; may be empty.
        state: ``digests`` are filled in here.
        keep: newest checkpoints that stay, >= 1.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{state.step}"
    if target.exists():
        try:
            # The end of a stage, or a signal, at a step that is saved already: never take it away to write it again.
            load_checkpoint(target)
            return target
        except ValueError:
            shutil.rmtree(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in policy.items()}, staging / POLICY_FILE)
        save_file(optimizer, staging / OPTIMIZER_FILE)
        digests = {name: _digest(staging / name) for name in (POLICY_FILE, OPTIMIZER_FILE)}
        text = json.dumps({**asdict(state), "digests": digests}, indent=1, sort_keys=True)
        (staging / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        for name in (POLICY_FILE, OPTIMIZER_FILE, STATE_FILE):
            _sync(staging / name)
        staging.chmod(0o755)
        os.replace(staging, target)
        _sync(root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in checkpoints(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; half-written ones have another name and are not among them."""
    found = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return [path for _, path in sorted(found, reverse=True)]


def clear_leftovers(root: Path) -> None:
    """Remove what a kill in the middle of a save left behind."""
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], TrainState]:
    """Read one checkpoint.

    Returns:
        Weights, optimiser tensors, state.

    Raises:
        ValueError: a file is missing, damaged, or of another format.
    """
    try:
        raw = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        known = {f.name for f in fields(TrainState)}
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or set(raw) != known:
            raise ValueError(f"{STATE_FILE} is not of format {FORMAT}")
        state = TrainState(**raw)
        for name in (POLICY_FILE, OPTIMIZER_FILE):
            if _digest(path / name) != state.digests.get(name):
                raise ValueError(f"{name} is not what was written")
        return load_file(path / POLICY_FILE), load_file(path / OPTIMIZER_FILE), state
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be used: {error}") from error


def newest_checkpoint(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], TrainState] | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    found = checkpoints(root)
    for path in found:
        try:
            return load_checkpoint(path)
        except ValueError as error:
            logger.warning("%s", error)
    if found:
        raise ConfigurationError(f"every checkpoint in {root} is damaged")
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Force to disk, so that the rename is never older than what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
