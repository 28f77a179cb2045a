"""How much is decoded at once, over all requests of the process."""

from __future__ import annotations

import threading
import time

from score_vllm.video.container import DecoderBusyError


class Gate:
    """A bound on jobs at work, jobs waiting, and bytes held.

    Args:
        workers: jobs at work at once.
        max_queued: jobs waiting; one more is refused.
        max_bytes: encoded and decoded bytes held at once; None: no bound. A single job above it may run alone.
    """

    def __init__(self, workers: int, max_queued: int, max_bytes: int | None) -> None:
        self.workers, self.max_queued, self.max_bytes = workers, max_queued, max_bytes
        self._change = threading.Condition()
        self.active = 0
        self.waiting = 0
        self.held = 0

    def _fits(self, size: int, own: int) -> bool:
        return self.max_bytes is None or self.held + size <= self.max_bytes or self.held <= own

    def enter(self, size: int, timeout: float) -> int:
        """Wait for a place and ``size`` bytes.

        Returns:
            How many jobs are at work now, this one included.

        Raises:
            DecoderBusyError: the queue is full, or the time ran out.
        """
        end = time.monotonic() + timeout
        with self._change:
            if self.waiting >= self.max_queued:
                raise DecoderBusyError(f"{self.waiting} videos wait to be decoded already; try again later")
            self.waiting += 1
            try:
                while self.active >= self.workers or not self._fits(size, 0):
                    self._wait(end)
            finally:
                self.waiting -= 1
            self.active += 1
            self.held += size
            return self.active

    def grow(self, size: int, own: int, timeout: float) -> None:
        """Wait for ``size`` bytes more, for a job that holds ``own``.

        Raises:
            DecoderBusyError: the time ran out.
        """
        end = time.monotonic() + timeout
        with self._change:
            while not self._fits(size, own):
                self._wait(end)
            self.held += size

    def _wait(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0 or not self._change.wait(left):
            raise DecoderBusyError("other videos take all of the decoder's capacity; try again later")

    def leave(self) -> None:
        """The job is over; its bytes are given back apart from it."""
        with self._change:
            self.active -= 1
            self._change.notify_all()

    def give_back(self, size: int) -> None:
        """Bytes are free again."""
        with self._change:
            self.held -= size
            self._change.notify_all()
