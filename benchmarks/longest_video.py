"""The longest video that an engine answers, by search; used by ``scaling.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent))
from engine_process import Worker, WorkerDied


def longest_that_fits(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """Largest even number of frames for which ``fits`` holds, by doubling and then halving.

    Args:
        fits: True up to some length, False above.
        start: even, at least 4: tried first.
        limit: even: never above.

    Returns:
        In [0, limit]; 0 where not even ``start`` fits.
    """
    if start < 4 or start % 2 or limit % 2 or limit < start:
        raise ValueError(f"start must be even, >= 4 and <= limit (even), got start {start} and limit {limit}")
    if not fits(start):
        return 0
    low, high = start, start
    while low == high:
        if low == limit:
            return limit
        high = min(2 * low, limit)
        if fits(high):
            low = high
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Prober:
    """Asks one engine whether a video of some length fits; starts it again where a try ended it.

    Args:
        name: of the row, for the bar and the log.
        setup: what the engine process is told.
        ratio: retention ratio; None for plain vLLM.
        folder: for the log.
        check: called with every answer and its number of frames; ends the run where the answer is wrong.
    """

    def __init__(
        self,
        name: str,
        setup: dict[str, Any],
        ratio: float | None,
        folder: Path,
        check: Callable[[dict[str, Any], int], None],
    ) -> None:
        self.refusals: dict[int, str] = {}
        self._setup, self._ratio, self._check = setup, ratio, check
        self._log = folder / f"fit-{name}.log"
        self._worker = Worker(setup, self._log)
        self._progress = tqdm(desc=f"longest that fits, {name}", unit="try")

    def fits(self, frames: int) -> bool:
        """True where the engine answers; otherwise ``refusals[frames]`` says why not."""
        self._progress.update()
        try:
            result = self._worker.ask(frames=frames, seed=frames, tokens=1, ratio=self._ratio)
        except WorkerDied as error:
            self.refusals[frames] = str(error).splitlines()[0]
            self._worker.stop()
            self._worker = Worker(self._setup, self._log)
            return False
        if "refused" in result:
            self.refusals[frames] = result["refused"]
            return False
        self._check(result, frames)
        return True

    def close(self) -> None:
        """End the engine."""
        self._progress.close()
        self._worker.stop()
