"""The log of a run, as the report's curves need it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from score_vllm.train.report.charts import Line, binned, chart

# Title, and per line: what the log calls it, its legend, its colour, whether it is one minus that.
CURVES: tuple[tuple[str, tuple[tuple[str, str, str, bool], ...]], ...] = (
    ("Loss", (("loss", "loss", "c1", False),)),
    (
        "Cross-entropy, nats per token",
        (("ce_base", "all tokens", "c0", False), ("ce", "rollouts", "c1", False)),
    ),
    ("Reward of a rollout", (("reward", "mean", "c1", False),)),
    ("Share kept in rollouts", (("sparsity", "kept", "c1", True),)),
    ("Rollouts within tau of all tokens", (("safe_share", "share", "c1", False),)),
    ("Spread of cross-entropy within a group", (("ce_spread", "standard deviation", "c1", False),)),
    ("Entropy of the first pick, share of the largest", (("choice_entropy", "entropy", "c1", False),)),
    ("Entropy of the decisions", (("entropy", "entropy", "c1", False),)),
    ("Spread of the logits", (("logit_spread", "standard deviation", "c1", False),)),
    ("Learning rate", (("lr", "learning rate", "c1", False),)),
)


@dataclass(frozen=True)
class History:
    """A run as its log tells it.

    Attributes:
        steps: lines of steps, the newest run of the file alone.
        seconds: spent in steps, without pauses between a stop and a resumption.
        diagnosis: why training stopped itself; empty where it did not.
    """

    steps: list[dict[str, Any]]
    seconds: float
    diagnosis: str

    def curves(self) -> list[str]:
        """A chart for each of :data:`CURVES` that the log has numbers for."""
        names: dict[str, int] = {}
        for row in self.steps:
            names.setdefault(row.get("stage", ""), row["step"])
        marks = [(float(step), name) for name, step in names.items()] if len(names) > 1 else []
        at = [float(row["step"]) for row in self.steps]
        drawn = []
        for title, wanted in CURVES:
            lines: list[Line] = []
            for key, label, colour, inverse in wanted:
                values = [row.get(key) for row in self.steps]
                if key == "entropy" and values == [row.get("choice_entropy") for row in self.steps]:
                    continue  # the same thing where budgets are equal
                lines.append(binned(label, at, [1 - v if inverse and v is not None else v for v in values], colour))
            drawn.append(chart(title, lines, "step", marks=marks, write_x="{:,.0f}".format))
        return [one for one in drawn if one]


def read_history(path: Path) -> History:
    """Read ``log.jsonl``; lines that a kill cut short are passed over, a missing file is an empty run."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            row["event"], row["step"], row["time"]
        except (ValueError, KeyError, TypeError):
            continue
        rows = [row] if row["event"] == "started" else [*rows, row]
    # Lines of a start and of a resumption have the time of day instead: no pause is counted.
    times = [row["time"] if isinstance(row["time"], float | int) else None for row in rows]
    seconds = sum(b - a for a, b in itertools.pairwise(times) if a is not None and b is not None)
    diagnosis = next((row.get("diagnosis", "") for row in reversed(rows) if row["event"] == "failed"), "")
    if rows and rows[-1]["event"] == "finished":
        diagnosis = ""
    return History([row for row in rows if row["event"] == "step"], seconds, diagnosis)
