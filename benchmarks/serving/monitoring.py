"""What a running server uses: its memory and its KV cache."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import httpx
import psutil

if TYPE_CHECKING:
    from benchmarks.serving.server import Server


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and all its descendants; pages that they share count once for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


class Background:
    """Runs :meth:`_run` in a thread of its own while a ``with`` body runs; it ends once ``_end`` is set."""

    def __init__(self) -> None:
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(60)

    def _run(self) -> None:
        raise NotImplementedError


class Monitor(Background):
    """Samples a server.

    Attributes:
        peak_rss: bytes, see :func:`tree_rss`.
        peak_kv: largest used share of the KV cache, in [0, 1].
    """

    def __init__(self, server: Server, interval: float = 0.5) -> None:
        super().__init__()
        self.peak_rss, self.peak_kv = 0, 0.0
        self._server, self._interval = server, interval

    def _run(self) -> None:
        while not self._end.is_set():
            self.peak_rss = max(self.peak_rss, tree_rss(self._server.process.pid))
            with contextlib.suppress(httpx.HTTPError):
                self.peak_kv = max(self.peak_kv, self._server.metrics().get("vllm:kv_cache_usage_perc", 0.0))
            self._end.wait(self._interval)
