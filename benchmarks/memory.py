"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """``with PeakMemory() as memory: ...`` leaves the highest use above the start, in bytes, in ``memory.peak``.

    On a GPU: bytes that torch allocated, outputs of the work included. On a CPU: resident memory by the kernel's
    high-water mark (proc(5)); None where the system does not tell.
    """

    peak: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._start = -1
        with contextlib.suppress(OSError, AttributeError):
            # Give freed memory back first, or the work would use it again unseen; then reset the mark.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._start
        elif self._start >= 0:
            self.peak = max(0, _status("VmHWM") - self._start)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
