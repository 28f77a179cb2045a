"""What the compressor does, counted in the worker and read by the API processes, without a sync or a lock.

A worker owns one small file of float64: the histogram's bucket counts and the numbers of :class:`Totals`. It is the
only writer; the metrics page adds up the files of all workers.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

logger = logging.getLogger(__name__)

# Names the folder in which workers leave their files. Not part of the model's configuration: a path that changes with
# every start would make vLLM compile every model anew.
STATS_VARIABLE = "SCORE_STATS_DIR"
# Upper bounds in seconds; one more bucket counts what is above the last.
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SECONDS, _NAN, _ENCODED, _REUSED, _CACHE_BYTES = range(len(BUCKETS) + 1, len(BUCKETS) + 6)
_SIZE = _CACHE_BYTES + 1


@dataclass(frozen=True)
class Totals:
    """Sums over all workers.

    Attributes:
        counts: videos per bucket of seconds of selection (not cumulative; the last is the overflow).
        seconds: of selection.
        nan_videos: videos with NaN scores.
        encoded_cells: temporal cells that the tower encoded.
        reused_cells: cells of encoded videos whose tower output was there already.
        cache_bytes: of the cells held now.
    """

    counts: list[int]
    seconds: float
    nan_videos: int
    encoded_cells: int
    reused_cells: int
    cache_bytes: int


@dataclass
class _Video:
    """One video under measurement.

    Attributes:
        has_nan: set by the measured code: 0-dim bool, True where its scores are NaN.
    """

    has_nan: torch.Tensor | None = None


class CompressorStats:
    """The numbers of one worker.

    Args:
        directory: where the file of this process goes; None, or one that another machine has, keeps the numbers in
            this process.
    """

    def __init__(self, directory: str | None) -> None:
        self._numbers = np.zeros(_SIZE)
        self._pending: deque[tuple[_Video, torch.cuda.Event, torch.cuda.Event]] = deque()
        if directory is not None and Path(directory).is_dir():
            path = Path(directory) / f"compressor-{os.getpid()}.f64"
            self._numbers = np.memmap(path, dtype=np.float64, mode="w+", shape=(_SIZE,))

    @property
    def nan_videos(self) -> int:
        """Videos with NaN scores since the last reset, as far as their results have arrived."""
        return int(self._numbers[_NAN])

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._pending.clear()
        self._numbers[:] = 0

    def _record(self, seconds: float, has_nan: bool) -> None:
        self._numbers[int(np.searchsorted(BUCKETS, seconds))] += 1
        self._numbers[_SECONDS] += seconds
        if has_nan:
            # Ending the engine would end every request; such a video keeps tokens by index.
            self._numbers[_NAN] += 1
            logger.error(
                "a video's scores are NaN: its vision features are broken, and so is its answer (%d such videos yet)",
                self.nan_videos,
            )

    def count_cells(self, encoded: int, reused: int, cache_bytes: int) -> None:
        """Add the cells of one video; ``cache_bytes`` is what the cell cache holds after it."""
        self._numbers[_ENCODED] += encoded
        self._numbers[_REUSED] += reused
        self._numbers[_CACHE_BYTES] = cache_bytes

    def collect(self) -> None:
        """Take in what the GPU has finished; called in every step, costs nothing where nothing is pending."""
        while self._pending and self._pending[0][2].query():
            video, begun, ended = self._pending.popleft()
            seconds = begun.elapsed_time(ended) / 1000.0
            self._record(seconds, video.has_nan is not None and bool(video.has_nan))

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[_Video]:
        """Time the body and take the flag that it leaves in the yielded object.

        On a GPU time is between two events and the flag goes to pinned memory behind them; both are read in
        :meth:`collect`.
        """
        video = _Video()
        if device.type != "cuda":
            start = time.perf_counter()
            yield video
            self._record(time.perf_counter() - start, video.has_nan is not None and bool(video.has_nan))
            return
        self.collect()
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        yield video
        if video.has_nan is not None:
            host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            video.has_nan = host.copy_(video.has_nan, non_blocking=True)
        ended.record()
        self._pending.append((video, begun, ended))


def read_stats(directory: Path) -> Totals:
    """Sums over the workers that were given this directory."""
    total = np.zeros(_SIZE)
    for path in sorted(directory.glob("compressor-*.f64")):
        numbers = np.fromfile(path, dtype=np.float64)
        if numbers.shape == total.shape:
            total += numbers
    return Totals([int(count) for count in total[:_SECONDS]], float(total[_SECONDS]), *map(int, total[_NAN:]))
