"""Engine processes of ``scaling.py``, seen from the parent: start, ask, end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from scaling_worker import MARK

HERE = Path(__file__).resolve().parent


class WorkerDied(RuntimeError):
    """The engine's process ended; its log is named."""


class Worker:
    """The parent's end of an engine process; one that ended by running out of memory is replaced by a new one."""

    def __init__(self, setup: dict[str, Any], log: Path) -> None:
        self.log = log
        self._setup = setup
        self._start()

    def _start(self) -> None:
        setup = self._setup
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        if Path(setup["model"]).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, str(HERE / "scaling_worker.py"), json.dumps(setup)]
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=env
            )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        code = self._process.wait()
        tail = self.log.read_text(errors="replace")[-2000:]
        raise WorkerDied(f"an engine process ended with {code} (log: {self.log}):\n{tail}")

    def ask(self, **order: Any) -> dict[str, Any]:
        """One order; raises :class:`WorkerDied`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        result = self._read()
        if result.get("ended"):
            self.stop()
            self._start()
        return result

    def stop(self) -> None:
        """End the process by closing its input, or by its id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()


@contextlib.contextmanager
def workers(setups: dict[str, dict[str, Any]], folder: Path) -> Iterator[dict[str, Worker]]:
    """Engines while the body runs."""
    made: dict[str, Worker] = {}
    try:
        for name, setup in setups.items():
            made[name] = Worker(setup, folder / f"{name}.log")
        yield made
    finally:
        for worker in made.values():
            worker.stop()
