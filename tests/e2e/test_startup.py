"""Start-ups that must fail, as processes: loudly, and with one sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from benchmarks.serving.process import free_port, running_process

from .conftest import SCORE_SERVE, environment


def test_operator_mistake_is_one_sentence_and_an_exit_code(cache: Path, tmp_path: Path) -> None:
    command = [str(SCORE_SERVE), "--model", "demo", "--policy", str(tmp_path / "missing"), "--host", "127.0.0.1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(cache), timeout=240)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"score-serve: error: --policy: policy directory '{tmp_path / 'missing'}' does not exist"
    assert "Traceback" not in done.stderr


SABOTAGE = """
import os, sys

# Only in the processes that vLLM spawns, the plug-in is not loaded.
if any("spawn_main" in argument for argument in sys.orig_argv):
    os.environ["VLLM_PLUGINS"] = "something_else"
"""


def test_a_plugin_that_does_not_load_in_the_worker_stops_the_server(cache: Path, tmp_path: Path) -> None:
    """vLLM would go on and serve every video whole."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    env = environment(cache, PYTHONPATH=str(tmp_path), VLLM_WORKER_MULTIPROC_METHOD="spawn")
    log = tmp_path / "log"
    port = free_port()
    command = [str(SCORE_SERVE), "--model", "demo", "--host", "127.0.0.1", "--port", str(port)]
    with (
        pytest.raises(RuntimeError, match=r"the server ended with [1-9]"),
        running_process(command, f"http://127.0.0.1:{port}", log, env),
    ):
        pass
    text = log.read_text(errors="replace")
    assert "without SCORE: the plug-in did not load there" in text
