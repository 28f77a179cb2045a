"""The scripts in examples/, as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from score_vllm.demo import demo_clip

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_offline_inference() -> None:
    """An engine of its own, so among the long tests."""
    pytest.importorskip("vllm")
    lines = run("offline_inference.py", str(demo_clip()), "--retention", "0.1").splitlines()
    shown = [line for line in lines if line.startswith("ratio ")]
    tokens = [int(line.split(": ")[1].split()[0]) for line in shown]
    assert tokens[1] - tokens[0] == 1024 - 102
    assert all("star" in line for line in shown), shown


def test_own_method() -> None:
    assert "102 of 1024" in run("own_method.py", str(demo_clip()))
