"""What a worker does with videos, counted there and read by the API processes, without a sync or a lock.

A worker owns two small files of float64 and is their only writer. One holds the histograms and counters of the metrics
page, which adds up the files of all workers. The other is a ring of the last videos,
from which a request's log line takes the times of its own.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

logger = logging.getLogger(__name__)

# Names the folder in which workers leave their files. Not part of the model's configuration: a path that changes with
# every start would make vLLM compile every model anew.
STATS_VARIABLE = "SCORE_STATS_DIR"
# Upper bounds in seconds; one more bucket counts what is above the last.
BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# A histogram: a count per bucket (not cumulative; the last is the overflow), then the sum of seconds.
_HISTOGRAM = len(BUCKETS) + 2
_COMPRESSOR, _TOWER, _NAN = 0, _HISTOGRAM, 2 * _HISTOGRAM
_ENCODED, _REUSED, _CACHE_BYTES = range(_NAN + 1, _NAN + 4)
_SIZE = _CACHE_BYTES + 1
# Videos that the ring holds; columns: ticket as a float (unique enough), time.monotonic() at its end, seconds of the
# tower and of selection.
RING = 512

Item = TypeVar("Item")
# Seconds on a CPU, an event on a GPU's stream.
Stamp = float | torch.cuda.Event


def stats_directory() -> str | None:
    """Where this process leaves its files; None where nobody reads them, or the API process is on another machine."""
    directory = os.environ.get(STATS_VARIABLE)
    return directory if directory is not None and Path(directory).is_dir() else None


@dataclass
class _Video:
    """One video under measurement.

    Attributes:
        ticket: that its requests know it by; 0: none.
        tower: stamps before and after the vision tower; None where it was not measured.
        selection: stamps before and after selection.
        has_nan: set by the measured code: 0-dim bool, True where its scores are NaN.
    """

    ticket: int = 0
    tower: tuple[Stamp, Stamp] | None = None
    selection: tuple[Stamp, Stamp] = (0.0, 0.0)
    has_nan: torch.Tensor | None = None


class Histogram(NamedTuple):
    """Of one metric.

    Attributes:
        counts: per bucket, not cumulative; the last is the overflow.
        seconds: their sum.
    """

    counts: list[int]
    seconds: float


class Totals(NamedTuple):
    """Sums over all workers.

    Attributes:
        compressor: seconds of selection.
        tower: seconds of encoding.
        nan_videos: videos with NaN scores.
        encoded_cells: temporal cells that the tower encoded.
        reused_cells: cells of encoded videos whose tower output was there already.
        cache_bytes: of the cells held now.
    """

    compressor: Histogram
    tower: Histogram
    nan_videos: int
    encoded_cells: int
    reused_cells: int
    cache_bytes: int


class CompressorStats:
    """The numbers of one worker.

    Args:
        directory: where the files of this process go; None keeps the numbers in this process.
    """

    def __init__(self, directory: str | None) -> None:
        self._numbers, self._ring = np.zeros(_SIZE), np.zeros((RING, 4))
        self._recorded = 0
        self._encoded: _Video | None = None
        self._pending: deque[_Video] = deque()
        if directory is not None:
            path = Path(directory)
            self._numbers = np.memmap(path / f"compressor-{os.getpid()}.f64", np.float64, "w+", shape=(_SIZE,))
            self._ring = np.memmap(path / f"videos-{os.getpid()}.f64", np.float64, "w+", shape=(RING, 4))

    @property
    def nan_videos(self) -> int:
        """Videos with NaN scores since the last reset, as far as their results have arrived."""
        return int(self._numbers[_NAN])

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._pending.clear()
        self._numbers[:] = 0

    def count_cells(self, encoded: int, reused: int, cache_bytes: int) -> None:
        """Add the cells of one video; ``cache_bytes`` is what the cell cache holds after it."""
        self._numbers[_ENCODED] += encoded
        self._numbers[_REUSED] += reused
        self._numbers[_CACHE_BYTES] = cache_bytes

    def encoding(self, items: Iterable[Item], tickets: Iterable[int], device: torch.device) -> Iterator[Item]:
        """Pass on what the tower makes, one video at a time, and time it.

        Args:
            items: of the videos. An iterator makes each when it is asked for; what is there already is not timed.
            tickets: of the same videos.
            device: of the tower.
        """
        made = iter(items)
        for ticket in tickets:
            begun = _stamp(device)
            try:
                item = next(made)
            except StopIteration:
                return
            self._encoded = _Video(int(ticket), (begun, _stamp(device)) if made is items else None)
            yield item

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[_Video]:
        """Time the selection in the body and take the flag that it leaves in the yielded object.

        On a GPU time is between two events and the flag goes to pinned memory behind them; both are read in
        :meth:`collect`.
        """
        self.collect()
        video, self._encoded = self._encoded or _Video(), None
        begun = _stamp(device)
        yield video
        if video.has_nan is not None and device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            video.has_nan = host.copy_(video.has_nan, non_blocking=True)
        video.selection = begun, _stamp(device)
        self._pending.append(video)
        if device.type != "cuda":
            self.collect()

    def collect(self) -> None:
        """Take in what the GPU has finished; called in every step, costs nothing where nothing is pending."""
        while self._pending and _has_passed(self._pending[0].selection[1]):
            self._record(self._pending.popleft())

    def _record(self, video: _Video) -> None:
        selection = _seconds(*video.selection)
        tower = math.nan if video.tower is None else _seconds(*video.tower)
        for start, seconds in ((_COMPRESSOR, selection), *([(_TOWER, tower)] if video.tower else [])):
            self._numbers[start + int(np.searchsorted(BUCKETS, seconds))] += 1
            self._numbers[start + _HISTOGRAM - 1] += seconds
        if video.ticket:
            self._ring[self._recorded % RING] = video.ticket, time.monotonic(), tower, selection
            self._recorded += 1
        if video.has_nan is not None and bool(video.has_nan):
            # Ending the engine would end every request; such a video keeps tokens by index.
            self._numbers[_NAN] += 1
            logger.error(
                "a video's scores are NaN: its vision features are broken, and so is its answer (%d such videos yet)",
                self.nan_videos,
            )


def _stamp(device: torch.device) -> Stamp:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _has_passed(stamp: Stamp) -> bool:
    return isinstance(stamp, float) or stamp.query()


def _seconds(begun: Stamp, ended: Stamp) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        return float(ended) - float(begun)  # type: ignore[arg-type]
    return begun.elapsed_time(ended) / 1000.0


def read_stats(directory: Path) -> Totals:
    """Sum over all workers.

    Args:
        directory: the one given to the workers.
    """
    total = np.zeros(_SIZE)
    for path in sorted(directory.glob("compressor-*.f64")):
        numbers = np.fromfile(path, dtype=np.float64)
        if numbers.shape == total.shape:
            total += numbers

    def histogram(start: int) -> Histogram:
        *counts, seconds = total[start : start + _HISTOGRAM]
        return Histogram([int(count) for count in counts], float(seconds))

    return Totals(histogram(_COMPRESSOR), histogram(_TOWER), *map(int, total[_NAN:]))


def read_videos(directory: Path, tickets: Iterable[int], since: float) -> dict[int, tuple[float, float]]:
    """Seconds of the tower and of selection of videos that workers have finished.

    Args:
        directory: the one given to the workers.
        tickets: of the videos.
        since: leave out what was finished before this ``time.monotonic()``.

    Returns:
        By ticket; the latest where a video was encoded more than once, NaN for a tower that was not timed. Absent: not
        encoded since then.
    """
    wanted, found = {float(ticket): ticket for ticket in tickets}, {}
    for path in sorted(directory.glob("videos-*.f64")) if wanted else ():
        rows = np.fromfile(path, dtype=np.float64)
        if rows.size != RING * 4:
            continue
        rows = rows.reshape(RING, 4)
        for key, _, tower, selection in sorted(rows[rows[:, 1] >= since].tolist(), key=lambda row: row[1]):
            if key in wanted:
                found[wanted[key]] = (tower, selection)
    return found
