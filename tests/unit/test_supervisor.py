"""The supervisor over processes that behave badly on purpose; over a real server: tests/e2e/test_supervision.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

if importlib.util.find_spec("vllm") is None:  # found, not imported: that takes seconds of every worker
    pytest.skip("vllm is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

# Becomes supervised, starts an "engine" that ignores signals, writes both process ids, and then does what it is told.
SERVER = """
import os, signal, subprocess, sys, time
from score_vllm.server.cli import _become_supervised

folder = _become_supervised()
(folder / "socket").touch()
engine = subprocess.Popen(
    ["VLLM::EngineCore", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
    executable=sys.executable,
)
print(os.getpid(), engine.pid, folder, flush=True)
"""
IGNORES = "signal.signal(15, signal.SIG_IGN); time.sleep(600)"
FOLLOWS = "engine.wait(); print('the engine is gone', flush=True)"
GRACEFUL = "signal.signal(15, lambda *_: (engine.kill(), sys.exit(0))); time.sleep(600)"


class Supervised:
    """A server that does ``then``, under the supervisor."""

    def __init__(self, then: str, tmp_path: Path) -> None:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER + then],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        server, engine, folder = self.process.stdout.readline().split()
        self.server, self.engine, self.folder = psutil.Process(int(server)), psutil.Process(int(engine)), Path(folder)

    def end(self, seconds: float) -> tuple[int, list[str]]:
        """Exit code and last lines; nothing may be left."""
        out, _ = self.process.communicate(timeout=seconds)
        assert not self.server.is_running()
        assert not self.engine.is_running()
        assert not self.folder.exists()
        return self.process.returncode, out.splitlines()


def test_sigterm_ends_what_does_not_listen(tmp_path: Path) -> None:
    run = Supervised(IGNORES, tmp_path)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(10)[0] == 128 + signal.SIGTERM


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    run = Supervised(IGNORES, tmp_path)
    (run.folder / "drain").write_text("300")
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None, "running requests have 300 seconds"
    run.process.send_signal(signal.SIGINT)
    assert run.end(5)[0] == 128 + signal.SIGINT


def test_a_graceful_end_is_no_error(tmp_path: Path) -> None:
    run = Supervised(GRACEFUL, tmp_path)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(10) == (0, [])


def test_the_end_of_the_engine_is_named_and_no_success(tmp_path: Path) -> None:
    """vLLM's server leaves with 0 when its engine has died."""
    run = Supervised(FOLLOWS, tmp_path)
    time.sleep(3)  # the supervisor looks for new processes every two seconds
    run.engine.kill()
    code, lines = run.end(10)
    assert code == 1
    assert lines == [
        "the engine is gone",
        f"score-serve: error: the process EngineCore (pid {run.engine.pid}) died; the server has stopped",
    ]


def test_the_end_of_the_server_takes_its_engine_along(tmp_path: Path) -> None:
    run = Supervised(IGNORES, tmp_path)
    run.server.kill()
    code, lines = run.end(10)
    assert code == 128 + signal.SIGKILL
    assert lines == [f"score-serve: error: the server's process (pid {run.server.pid}) was ended by SIGKILL"]


def test_its_own_exit_code_goes_through(tmp_path: Path) -> None:
    run = Supervised("engine.kill(); sys.exit(3)", tmp_path)
    assert run.end(10)[0] == 3


def test_without_its_supervisor_the_server_ends(tmp_path: Path) -> None:
    run = Supervised(GRACEFUL, tmp_path)
    run.process.kill()
    psutil.wait_procs([run.server, run.engine], timeout=10)
    assert not run.server.is_running()
    assert not run.engine.is_running()


SHARES = "from multiprocessing.shared_memory import SharedMemory; memory = SharedMemory({name!r}, True, 4096); "


def test_shared_memory_of_killed_processes_is_removed(tmp_path: Path) -> None:
    name = f"score-test-{os.getpid()}"
    run = Supervised(SHARES.format(name=name) + "print('shared', flush=True); " + IGNORES, tmp_path)
    assert run.process.stdout is not None
    assert run.process.stdout.readline() == "shared\n"
    assert Path("/dev/shm", name).exists()
    run.process.send_signal(signal.SIGTERM)
    assert run.end(12)[0] == 128 + signal.SIGTERM
    assert not Path("/dev/shm", name).exists()


def test_a_folder_that_a_cleaner_of_tmp_removed_comes_back(tmp_path: Path) -> None:
    run = Supervised(GRACEFUL, tmp_path)
    shutil.rmtree(run.folder)
    while not run.folder.is_dir():
        assert run.process.poll() is None
        time.sleep(0.05)
    assert run.folder.stat().st_mode & 0o777 == 0o700
    run.process.send_signal(signal.SIGTERM)
    assert run.end(30)[0] == 0


def test_a_fork_of_a_worker_is_no_worker() -> None:
    """It has the worker's title until it becomes a compiler, and then it ends: that is no dead worker."""
    from score_vllm.server.supervisor import engine_name

    forks = "import os, time\nif pid := os.fork(): print(pid, flush=True)\ntime.sleep(600)"
    with subprocess.Popen(["VLLM::Worker", "-c", forks], executable=sys.executable, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        child = psutil.Process(int(worker.stdout.readline()))
        try:
            assert (engine_name(psutil.Process(worker.pid)) or "").startswith("Worker")
            assert engine_name(child) is None
        finally:
            child.kill()
            worker.kill()
