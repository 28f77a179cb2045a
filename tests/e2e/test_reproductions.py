"""The demo trained again, and the load benchmark as it is published: long, so outside ``make test``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from score_vllm.demo import demo_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(4 * 3600)]


def run(*arguments: object) -> None:
    """A command of the documentation; its progress bars go to the terminal."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, check=True)


def accuracies(output: Path, *arguments: object) -> dict[str, float]:
    """Share of right answers about 40 clips that nothing was trained on, by method."""
    options = ("--clips", 40, "--split", "reproduction", "--ratios", "0.1", "--output", output)
    run("benchmarks/accuracy.py", "--benchmark", "world", *options, *arguments)
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return {row["method"]: row["accuracy"] for row in rows}


def test_policy_of_the_demo(tmp_path: Path) -> None:
    """The paper's recipe in small, from nothing: at a tenth it beats chance's tokens and loses little."""
    run("-m", "score_vllm.train", "--config", "train/configs/demo.toml", "--set", f"output={tmp_path / 'score-0'}")
    right = accuracies(tmp_path / "accuracy.json", "--policies", tmp_path, "--methods", "random")
    assert right["score"] > right["random"] + 0.05
    assert right["score"] > right["vanilla"] - 0.03


def test_model_of_the_demo(tmp_path: Path) -> None:
    """Tower and language model from nothing; the shipped one went on for two runs more."""
    run("-m", "score_vllm.train.world", "--output", tmp_path / "model", "--minutes", 45)
    ours = accuracies(tmp_path / "ours.json", "--model", tmp_path / "model", "--methods", "uniform")["vanilla"]
    shipped = accuracies(tmp_path / "shipped.json", "--model", demo_model(), "--methods", "uniform")["vanilla"]
    assert ours > shipped - 0.1


def test_load(tmp_path: Path) -> None:
    """Every row at its published number of users; the script ends with 1 where a request fails."""
    run("-m", "benchmarks.serving.load", "--output", tmp_path / "load.json")
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert {row["config"] for row in rows} == {"vanilla", "SCORE 40%", "SCORE 25%", "SCORE 10%", "SCORE mixed"}
    assert not any(row["failures"] for row in rows)
