"""Engines in processes of their own: plain vLLM, tensor parallelism, bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
RUNNER = Path(__file__).parent / "run_engine.py"


DTYPES = "float32,bfloat16"


def run(model: Path, policy: Path | str, parallel: int = 1, dtypes: str = DTYPES) -> dict[str, Any]:
    """``{dtype: {ratio: [tokens of each prompt]}}``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if parallel > 1:
        # One core per rank where there are two; ranks are threads' masters, not their owners.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(parallel))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(model), str(policy), str(parallel), dtypes],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"the engine printed no result (exit {done.returncode}):\n{done.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def compressed(tiny_model: Path, tiny_policy: Path) -> dict[str, Any]:
    return run(tiny_model, tiny_policy)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> dict[str, Any]:
    return run(tiny_model, "-")


@pytest.mark.parametrize("dtype", DTYPES.split(","))
def test_ratio_one_equals_plain_vllm(compressed: dict[str, Any], plain: dict[str, Any], dtype: str) -> None:
    """Token for token, over videos, images beside them, and text alone; in bf16 too, the dtype of production, in which
    whole numbers above 256 do not survive without digits."""
    assert compressed[dtype]["1.0"] == plain[dtype]["1.0"]
    assert compressed[dtype]["0.1"][:3] != plain[dtype]["1.0"][:3], "a tenth of the tokens must make a difference"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_tensor_parallel_gives_the_same_tokens(compressed: dict[str, Any], tiny_model: Path, tiny_policy: Path) -> None:
    assert run(tiny_model, tiny_policy, parallel=2, dtypes="float32")["float32"] == compressed["float32"]
