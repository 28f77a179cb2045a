"""How long selection takes, measured in the worker and read by the API process, without a sync or a lock.

A worker owns one small file of float64: the histogram's bucket counts, then the sum of seconds. It is the only
writer; the metrics page adds up the files of all workers.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

# Names the folder in which workers leave their files. Not part of the model's configuration: a path that changes with
# every start would make vLLM compile every model anew.
STATS_VARIABLE = "SCORE_STATS_DIR"
# Upper bounds in seconds; one more bucket counts what is above the last.
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZE = len(BUCKETS) + 2


class CompressorTimer:
    """Histogram of compressor seconds.

    Args:
        directory: where the file of this process goes; None measures nothing.
    """

    def __init__(self, directory: str | None) -> None:
        self._cells: np.ndarray | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        if directory is not None:
            path = Path(directory) / f"compressor-{os.getpid()}.f64"
            self._cells = np.memmap(path, dtype=np.float64, mode="w+", shape=(_SIZE,))

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._pending.clear()
        if self._cells is not None:
            self._cells[:] = 0

    def _record(self, seconds: float) -> None:
        assert self._cells is not None
        self._cells[int(np.searchsorted(BUCKETS, seconds))] += 1
        self._cells[-1] += seconds

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time the body: wall time on the CPU; on a GPU, events that are read once they have passed."""
        if self._cells is None:
            yield
            return
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._record(time.perf_counter() - start)
            return
        while self._pending and self._pending[0][1].query():
            begun, ended = self._pending.popleft()
            self._record(begun.elapsed_time(ended) / 1000.0)
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        yield
        ended.record()
        self._pending.append((begun, ended))


def read_histogram(directory: Path) -> tuple[list[int], float]:
    """Sum of all workers' histograms.

    Args:
        directory: the one given to the workers.

    Returns:
        ``(counts, seconds)``: a count per bucket (not cumulative; the last is the overflow), and the sum.
    """
    total = np.zeros(_SIZE)
    for path in sorted(directory.glob("compressor-*.f64")):
        cells = np.fromfile(path, dtype=np.float64)
        if cells.shape == total.shape:
            total += cells
    return [int(count) for count in total[:-1]], float(total[-1])
