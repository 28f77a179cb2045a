"""The process that a user starts and stops: it watches the server's processes, ends them all, and cleans up.

A script, run by path: it holds nothing but psutil in memory. ``score-serve`` forks the server and turns itself into
this (:func:`score_vllm.server.cli.main`), so the process id that the user knows stays the same.

Usage: supervisor.py SERVER_PID FOLDER
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# File in FOLDER where the server leaves the seconds that running requests may take to finish (--shutdown-timeout).
DRAIN_FILE = "drain"
# Seconds between the request to stop and the kernel's kill, beyond the time for running requests.
STOP_SECONDS = 6.0
# Seconds in which the server notices by itself that one of its processes is gone, and ends with its own messages.
NOTICE_SECONDS = 15.0
# Seconds in which Python's resource trackers remove the shared memory of processes that were killed.
TRACKER_SECONDS = 2.0
POLL_SECONDS = 0.2
SCAN_SECONDS = 2.0
TITLE = "VLLM::"


def processes_below() -> list[psutil.Process]:
    """Every process that the server has started, children before grandchildren; orphans come to us."""
    return psutil.Process().children(recursive=True)


def engine_name(process: psutil.Process) -> str | None:
    """``EngineCore``, ``Worker_TP0``...; None for processes that may come and go: a compiler, say, has the title of the
    worker that starts it until it is a program of its own."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())
        if (parent := process.parent()) is not None and " ".join(parent.cmdline()) == title:
            return None
        return title.removeprefix(TITLE).split()[0] if title.startswith(TITLE) else None
    return None


def has_ended(process: psutil.Process) -> bool:
    """Gone, or dead and not yet collected by its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def reap(server: int) -> int | None:
    """Collect ended children; the server's exit code (minus the signal's number) once it has one."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == server:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def is_tracker(process: psutil.Process) -> bool:
    """Python's resource tracker: it ends by itself once those that it watches have, and removes what they left."""
    with contextlib.suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False


def end_all(server: int) -> int | None:
    """Kill what is left, resource trackers last. A process that starts another one meanwhile is met again.

    Returns:
        The server's exit code, where it was among them.
    """
    code = None
    patience = time.monotonic() + TRACKER_SECONDS
    while left := processes_below():
        for process in left:
            if time.monotonic() < patience and is_tracker(process):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
        if (ended := reap(server)) is not None:
            code = ended
    return code


def drain_seconds(folder: Path) -> float:
    try:
        return float((folder / DRAIN_FILE).read_text())
    except (OSError, ValueError):
        return 0.0


def watch(server: int, folder: Path) -> int:
    """Until the server has ended; returns the exit code to leave with."""
    root = psutil.Process(server)
    watched: dict[psutil.Process, str] = {}
    asked: int | None = None
    dead: tuple[str, int] | None = None
    deadline = scan = 0.0
    while (code := reap(server)) is None:
        now = time.monotonic()
        if now > scan:
            watched |= {p: name for p in processes_below() if p.pid != server and (name := engine_name(p))}
            scan = now + SCAN_SECONDS
            # Cleaners of /tmp remove what is old; a compiler that then finds no folder would end the engine.
            folder.mkdir(mode=0o700, exist_ok=True)
        if asked is None and dead is None:
            # The deepest first: a worker's end may already have taken its engine along.
            dead = next(((name, p.pid) for p, name in reversed(watched.items()) if has_ended(p)), None)
            deadline = now + NOTICE_SECONDS
        elif now > deadline:
            code = end_all(server)
            break
        signum = signal.sigtimedwait((*STOP, signal.SIGCHLD), POLL_SECONDS)
        if signum is None or signum.si_signo not in STOP:
            continue
        # The second one is meant.
        deadline = 0.0 if asked is not None else time.monotonic() + STOP_SECONDS + drain_seconds(folder)
        asked = signum.si_signo
        with contextlib.suppress(psutil.NoSuchProcess):
            root.send_signal(signal.SIGTERM)
    end_all(server)
    if asked is not None:
        return 0 if code == 0 else 128 + asked
    if dead is not None:
        print(
            f"score-serve: error: the process {dead[0]} (pid {dead[1]}) died; the server has stopped", file=sys.stderr
        )
        return code if code and code > 0 else 1
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        print(f"score-serve: error: the server's process (pid {server}) was ended by {name}", file=sys.stderr)
        return 128 - code
    return 1 if code is None else code


def main() -> None:
    """Entry point; signals to stop are blocked since before the server was forked."""
    server, folder = int(sys.argv[1]), Path(sys.argv[2])
    try:
        code = watch(server, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
