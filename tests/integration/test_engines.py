"""Engines in processes of their own: plain vLLM, tensor parallelism, bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
RUNNER = Path(__file__).parent / "run_engine.py"


def run(model: Path, policy: Path | str, parallel: int = 1, dtype: str = "float32") -> dict[str, list[list[int]]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    if parallel > 1:
        # One core per rank where there are two; ranks are threads' masters, not their owners.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(parallel))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(model), str(policy), str(parallel), dtype],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"the engine printed no result (exit {done.returncode}):\n{done.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def compressed(tiny_model: Path, tiny_policy: Path) -> dict[str, list[list[int]]]:
    return run(tiny_model, tiny_policy)


def test_ratio_one_equals_plain_vllm(compressed: dict[str, list[list[int]]], tiny_model: Path) -> None:
    """Token for token, over videos, images beside them, and text alone."""
    plain = run(tiny_model, "-")
    assert compressed["1.0"] == plain["1.0"]
    assert compressed["0.1"][:3] != plain["1.0"][:3], "a tenth of the tokens must make a difference somewhere"


def test_ratio_one_equals_plain_vllm_in_bf16(tiny_model: Path, tiny_policy: Path) -> None:
    """The dtype of production, in which whole numbers above 256 do not survive without digits."""
    assert run(tiny_model, tiny_policy, dtype="bfloat16")["1.0"] == run(tiny_model, "-", dtype="bfloat16")["1.0"]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_tensor_parallel_gives_the_same_tokens(
    compressed: dict[str, list[list[int]]], tiny_model: Path, tiny_policy: Path
) -> None:
    assert run(tiny_model, tiny_policy, parallel=2) == compressed
