"""Reasons to stop: a signal, numbers that are not finite, a policy that no longer chooses."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

# Kept shares within this of 0 or 1 are none or all.
COLLAPSE_MARGIN = 1e-3
# Logits closer together than this order nothing.
FLAT_LOGITS = 1e-6
# Rollouts hardly differ below this share of the largest entropy: that of the first pick where budgets are equal, else
# what the kept share allows. A trained demo policy has 0.24 and more, one that AdamW at 0.02 destroyed 0.04 and less.
LOW_ENTROPY = 0.1


class TrainingStoppedError(RuntimeError):
    """Training cannot go on; the message is the diagnosis."""


class StopSignal:
    """SIGTERM and SIGINT as a flag, so that a step ends and is saved; a second SIGINT interrupts at once.

    Use as a context manager in the main thread; elsewhere it does nothing.

    Attributes:
        received: number of the signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class CollapseWatch:
    """Counts steps in a row in which the policy keeps everything, keeps nothing, ranks nothing or no longer varies.

    Args:
        patience: such steps before :meth:`check` raises; 0 never raises.

    Attributes:
        streak: such steps so far; saved with the checkpoint.
    """

    def __init__(self, patience: int, streak: int = 0) -> None:
        self.patience, self.streak = patience, streak

    def check(self, values: Mapping[str, float], exact: bool) -> None:
        """Look at one step.

        Args:
            values: metrics by the names of :data:`~score_vllm.train.step.METRICS`, means over the step's videos.
            exact: True where rollouts keep a given number, so that the kept share says nothing.

        Raises:
            TrainingStoppedError: patience has run out.
        """
        kept, spread, entropy = 1 - values["sparsity"], values["logit_spread"], values["entropy"]
        largest = 1.0 if exact else _binary_entropy(kept)
        signs = {
            "keeps every token": not exact and kept > 1 - COLLAPSE_MARGIN,
            "keeps no token": not exact and kept < COLLAPSE_MARGIN,
            "gives all tokens the same score": exact and spread < FLAT_LOGITS,
            "draws the same mask every time, so that no gradient is left": values["equal_masks"] == 1,
            "no longer varies its masks": entropy < LOW_ENTROPY * largest,
        }
        what = next((words for words, seen in signs.items() if seen), "")
        self.streak = self.streak + 1 if what else 0
        if self.patience and self.streak >= self.patience:
            raise TrainingStoppedError(
                f"the policy has collapsed: for {self.streak} steps it {what} (kept share {kept:.4f}, entropy "
                f"{entropy:.4f}, spread of the logits {spread:.2e}). A lower optimizer.lr, a smaller "
                "optimizer.grad_clip or another stage tau may help; go on from an earlier checkpoint"
            )


def _binary_entropy(share: float) -> float:
    """Largest mean entropy, in nats, of decisions that keep this share."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
