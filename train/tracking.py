"""Progress of training: a line of JSON per step, trackers through accelerate, a progress bar."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from score_vllm.files import write_atomically
from score_vllm.train.config import TrackingSettings
from score_vllm.train.schema import MissingError

LOG_NAME = "log.jsonl"


class RunLog:
    """``log.jsonl``: one JSON object per line, each with the step, the time and an event.

    Args:
        path: of the file; made where missing.
        resumed_at: lines of later steps are dropped first, since those steps are done again.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_at is not None and path.is_file():
            _cut(path, resumed_at)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line and flush it. Numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}
        line = {"event": event, "step": step, "time": round(time.time(), 3), **clean}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a line that a kill cut short goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
    write_atomically(path, lambda part: part.write_text("".join(kept), encoding="utf-8"))


def start_trackers(accelerator: Any, settings: TrackingSettings, plain: dict[str, Any]) -> None:
    """Start the chosen tracker with the run's configuration.

    Args:
        accelerator: made with ``log_with`` of this tracker.
        settings: which one.
        plain: the configuration; nested tables are flattened to dotted names.
    """
    if settings.tracker == "none":
        return
    accelerator.init_trackers(settings.project, config=_flat(plain))


def check_tracker(settings: TrackingSettings) -> None:
    """See that the chosen tracker is installed.

    Raises:
        MissingError: it is not; the message says how to get it.
    """
    import importlib.util

    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(settings.tracker)
    if package and importlib.util.find_spec(package) is None:
        raise MissingError(
            f"tracking.tracker is {settings.tracker!r}, which is not installed: pip install {package}, "
            "or --set tracking.tracker=none (log.jsonl is written in any case)"
        )


def _flat(table: Any, where: str = "") -> dict[str, Any]:
    if isinstance(table, dict | list):
        pairs = table.items() if isinstance(table, dict) else enumerate(table)
        return {k: v for key, value in pairs for k, v in _flat(value, f"{where}.{key}" if where else str(key)).items()}
    return {where: table if isinstance(table, int | float | str | bool) else str(table)}
