"""Start a server as a process, wait until it answers, end it by its own process id."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx


def free_port() -> int:
    """A port of the loopback that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-4000:]


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Return when ``url``/health answers.

    Raises:
        RuntimeError: the process ended, or did not answer in time; the log's path and end are in the message.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} (log: {log}):\n{tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=2)
            return
        time.sleep(0.3)
    raise RuntimeError(f"the server was not ready in {seconds:g} s (log: {log}):\n{tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; where SIGTERM does nothing for a minute, SIGKILL does."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def end_tidily_when_terminated() -> None:
    """Make SIGTERM unwind the main thread like Ctrl-C does, so that no server outlives its parent."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def running_process(
    command: Sequence[str],
    url: str,
    log: Path,
    env: dict[str, str],
    cwd: Path | None = None,
    seconds: float = 1200,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server while the body runs.

    Args:
        command: starts it.
        url: where it will answer.
        log: file for everything that it prints.
        env: its whole environment.
        cwd: its working directory.
        seconds: how long the start may take.

    Raises:
        RuntimeError: it ended before or during the body, or was not ready in time; the log is named.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_ready(url, process, log, seconds)
        yield process
        if process.poll() is not None:
            raise RuntimeError(f"the server died during the run (log: {log}):\n{tail(log)}")
    finally:
        stop(process)
