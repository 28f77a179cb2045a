"""What every artefact says about how it was made."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import score_vllm
from score_vllm.train.config import TrainSettings

PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def provenance(settings: TrainSettings, *, steps: int, processes: int) -> dict[str, Any]:
    """Facts for a JSON file.

    Args:
        settings: of the run.
        steps: optimiser steps behind the artefact.
        processes: that trained it.

    Returns:
        Digest of the configuration, objective, seed, commit (None outside a checkout), versions, time in UTC.
    """
    return {
        "config_digest": settings.digest(),
        "objective": settings.rollout.objective,
        "model": settings.model.path,
        "seed": settings.seed,
        "steps": steps,
        "processes": processes,
        **source_state(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def source_state() -> dict[str, Any]:
    """Commit of the checkout that the code runs from, whether it has changes, and the versions of what matters."""
    versions = {"score-vllm": score_vllm.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    changed = bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"commit": commit, "uncommitted_changes": changed, "versions": versions}


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    # An installed copy may lie inside somebody else's checkout: its commit would say nothing about this code.
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
