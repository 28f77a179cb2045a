"""Which versions the tests have run on: read from a record that the test runs write (scripts/compatibility.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

TIERS = ("unit", "kernels", "integration", "e2e")


@dataclass(frozen=True, slots=True)
class TestedRun:
    """One run of the tests.

    Attributes:
        vllm, transformers, torch, python: versions.
        platform: vLLM's: cpu or cuda.
        date: of the run, ISO.
        passed, failed, skipped: number of tests by tier.
    """

    __test__ = False  # no test class

    vllm: str
    transformers: str
    torch: str
    python: str
    platform: str
    date: str
    passed: dict[str, int]
    failed: dict[str, int]
    skipped: dict[str, int]

    @property
    def complete(self) -> bool:
        """Every tier has run, and nothing failed."""
        return all(self.passed.get(tier) for tier in TIERS) and not sum(self.failed.values())

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What two runs must share for the later one to replace the earlier."""
        return minor(self.vllm), minor(self.transformers), minor(self.python), self.platform


def minor(version: str) -> str:
    """``0.32`` of ``0.32.0+cpu``."""
    return ".".join(version.split(".")[:2])


def tested_runs() -> list[TestedRun]:
    """Newest first."""
    text = files("score_vllm").joinpath("assets/tested_versions.json").read_text()
    return sorted((TestedRun(**run) for run in json.loads(text)), key=lambda run: run.date, reverse=True)


def untested(vllm: str, transformers: str, python: str, platform: str | None = None) -> str | None:
    """What is new about these versions; None where a complete run had them all.

    Args:
        vllm, transformers, python: installed versions.
        platform: cpu or cuda; None leaves it out.
    """
    runs = [run for run in tested_runs() if run.complete]
    if not runs:
        return "no test run is recorded"
    asked = [("vLLM", vllm), ("transformers", transformers), ("Python", python)]
    wanted = tuple(minor(version) for _, version in asked)
    same = [run for run in runs if run.key[:3] == wanted]
    if same and (platform is None or any(run.platform == platform for run in same)):
        return None
    if same:
        return f"the tests have run on {same[0].platform}, not on {platform}"
    known = zip(*(run.key[:3] for run in runs), strict=True)
    new = [f"{name} {got}" for (name, got), seen in zip(asked, known, strict=True) if minor(got) not in seen]
    return f"no test run had {' and '.join(new) or 'these versions together'}"
