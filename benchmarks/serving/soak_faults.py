"""What the soak does to a running server: processes killed, its folder removed, descriptors and memory taken away."""

from __future__ import annotations

import contextlib
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.serving.monitoring import Background

# A server notices some of this only when it next wants what is gone.
FAULT_SECONDS = 2.0


def decoder_of(pid: int) -> psutil.Process:
    """The decoding server below a process: it has children of the same command line."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "decode_server" in " ".join(process.cmdline()):
                found.append(process)
    return next(p for p in found if p.parent() not in found)


def kill_decoder(pid: int) -> None:
    """And see it dead: a new one starts with the next video."""
    decoder = decoder_of(pid)
    decoder.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while decoder.is_running() and decoder.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def kill_decoding_children(pid: int) -> None:
    """Those that wait for a video, and those that have one."""
    for child in decoder_of(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def remove_folder(pid: int) -> None:
    """The server's folder for everything temporary."""
    shutil.rmtree(Path(decoder_of(pid).environ()["TMPDIR"]), ignore_errors=True)


def few_descriptors(pid: int) -> None:
    """Eight more than the API process has."""
    api = decoder_of(pid).parent()
    assert api is not None
    most = max(int(path.name) for path in Path(f"/proc/{api.pid}/fd").iterdir())
    with limited(api, resource.RLIMIT_NOFILE, most + 9):
        time.sleep(FAULT_SECONDS)


def little_memory(pid: int) -> None:
    """For what decodes: 16 MiB more than it has."""
    decoder = decoder_of(pid)
    with limited(decoder, resource.RLIMIT_AS, decoder.memory_info().vms + (16 << 20)):
        kill_decoding_children(pid)  # they were forked without the limit
        time.sleep(FAULT_SECONDS)
    kill_decoding_children(pid)


@contextlib.contextmanager
def limited(process: psutil.Process, limit: int, value: int) -> Iterator[None]:
    """Lower a process's soft limit for a while."""
    before = process.rlimit(limit)
    process.rlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.rlimit(limit, before)


FAULTS: dict[str, Callable[[int], None]] = {
    "decoding server killed": kill_decoder,
    "decoding children killed": kill_decoding_children,
    "file descriptors limited": few_descriptors,
    "memory of decoding limited": little_memory,
    "temporary folder removed": remove_folder,
}


class Faults(Background):
    """Brings them about in turn.

    Attributes:
        counts: how often each was done.
    """

    def __init__(self, pid: int, every: float) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._pid, self._every = pid, every

    def _run(self) -> None:
        while True:
            for name, bring_about in FAULTS.items():
                if self._end.wait(self._every):
                    return
                # Between two decoding servers there is none to find.
                with contextlib.suppress(psutil.Error, StopIteration, FileNotFoundError):
                    bring_about(self._pid)
                    self.counts[name] += 1
