"""What a running server uses: its metrics page, its memory, its KV cache."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watched(Protocol):
    """A server, as far as this file is concerned."""

    process: subprocess.Popen[bytes]

    def metrics(self) -> dict[str, float]:
        """Every sample of its metrics page."""


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of a Prometheus text page, summed over their labels except ``le`` and ``kind``.

    Returns:
        ``{"vllm:time_to_first_token_seconds_sum": 1.5, 'x_bucket{le="1"}': 3.0, ...}``.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$", line)
        if match is None:
            continue
        name, labels, value = match.groups()
        kept = re.findall(r'\b(?:le|kind)="[^"]*"', labels or "")
        key = f"{name}{{{','.join(kept)}}}" if kept else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and all its descendants; pages that they share count once for each."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * _PAGE
    return total


@dataclass
class Monitor:
    """Samples a server's memory and KV cache in a thread of its own while a ``with`` body runs.

    Attributes:
        peak_rss: bytes, see :func:`tree_rss`.
        peak_kv: largest used share of the KV cache, in [0, 1].
        interval: seconds between samples.
    """

    server: Watched
    interval: float = 0.5
    peak_rss: int = 0
    peak_kv: float = 0.0
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Monitor:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._end.is_set():
            self.peak_rss = max(self.peak_rss, tree_rss(self.server.process.pid))
            with contextlib.suppress(OSError):
                self.peak_kv = max(self.peak_kv, self.server.metrics().get("vllm:kv_cache_usage_perc", 0.0))
            self._end.wait(self.interval)
