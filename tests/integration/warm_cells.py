"""What the cell cache must not change, in any family: which cells are encoded, and that nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

# Frames, ratio and method of one request to the rows [T * N, W] that its video had, and its tokens.
Ask = Callable[[np.ndarray, float, str | None], tuple[torch.Tensor, list[int]]]


def forget_answers(llm: Any) -> None:
    """Empty vLLM's own caches, so that an equal request is encoded again."""
    llm.reset_prefix_cache()
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()


def check_warm_cells(
    ask: Ask, llm: Any, model: Any, frames: np.ndarray, per_cell: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask about a video again and again; ``ask`` holds every answer to the oracle.

    Args:
        frames: [26, H, W, 3], all different, never seen by the engine.
        per_cell: frames of a cell.
    """
    counts: list[tuple[int, int]] = []
    monkeypatch.setattr(
        model.compressor.stats, "count_cells", lambda encoded, reused, _: counts.append((encoded, reused))
    )

    def cells(parts: np.ndarray, ratio: float, method: str | None, encoded: int) -> tuple[torch.Tensor, list[int]]:
        answer = ask(parts, ratio, method)
        assert counts.pop() == (encoded // per_cell, (len(parts) - encoded) // per_cell)
        assert not counts
        return answer

    first, slide = frames[:16], np.concatenate([frames[24:]] * 4)
    mixed = np.concatenate([frames[20:22], frames[4:6], frames[20:22], frames[4:10]])
    cells(first, 0.4, None, encoded=16)
    asked: list[Any] = [(first, 0.3, None), (frames[8:24], 0.4, None), (slide, 0.4, None), (mixed, 0.4, None)]
    warm = [cells(*one, encoded) for one, encoded in zip(asked, (0, 8, 2, 0), strict=True)]
    for method in ("fastvid", "flashvid"):
        cells(first, 0.3, method, encoded=16)  # for its saliency
        asked.append((first, 0.4, method))
        warm.append(cells(*asked[-1], encoded=0))
    cells(first, 0.2, None, encoded=0)
    # Without the cache every cell is encoded, and nothing else is different.
    monkeypatch.setattr(model.compressor.cells, "_cache", None)
    forget_answers(llm)
    for (rows, tokens), one in zip(warm, asked, strict=True):
        cold_rows, cold_tokens = cells(*one, encoded=len(one[0]))
        assert torch.equal(rows, cold_rows), f"rows differ by {(rows - cold_rows).abs().max()}"
        assert tokens == cold_tokens
