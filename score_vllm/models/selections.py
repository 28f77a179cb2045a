"""What a worker kept of its last videos, for requests that ask to see it (``score_explain``)."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from score_vllm.types import VideoGrid

# Together 16 MiB on the worker's device, and a few on its host.
MAX_INDICES = 2 << 20
MAX_VIDEOS = 4096


class RecentSelections:
    """The index tensors of the last videos, where the selection left them: neither copied nor waited for.

    Args:
        max_indices: kept tokens held over all videos; those of a video kept whole are not held.
        max_videos: videos held.
    """

    def __init__(self, max_indices: int = MAX_INDICES, max_videos: int = MAX_VIDEOS) -> None:
        self._max_indices, self._max_videos = max_indices, max_videos
        self._videos: OrderedDict[str, tuple[VideoGrid, torch.Tensor | None]] = OrderedDict()
        self._indices = 0

    def keep(self, key: str, grid: VideoGrid, indices: torch.Tensor) -> None:
        """Hold one selection, and let the oldest go where it is one too many.

        Args:
            key: of the video as it was compressed; empty: nothing is held.
            grid: of its tokens.
            indices: [K] int64 flat indices ``t * N + n``.
        """
        if not key:
            return
        self._drop(key)
        held = None if len(indices) == grid.num_tokens else indices
        if held is not None and held.untyped_storage().nbytes() > 2 * held.nbytes:
            held = held.clone()  # a view would keep alive what it looks into
        self._videos[key] = grid, held
        self._indices += 0 if held is None else len(held)
        while self._indices > self._max_indices or len(self._videos) > self._max_videos:
            self._drop(next(iter(self._videos)))

    def _drop(self, key: str) -> None:
        _, held = self._videos.pop(key, (None, None))
        self._indices -= 0 if held is None else len(held)

    def explain(self, key: str) -> dict[str, Any] | None:
        """``kept_per_cell`` [T] and ``kept_mask``, base64 of T * N bits in the order of the flat index, the first the
        highest of its byte; None where the selection is not held (any more). Waits for the device."""
        if key not in self._videos:
            return None
        grid, held = self._videos[key]
        mask = np.ones(grid.num_tokens, dtype=bool)
        if held is not None:
            mask[:] = False
            mask[held.cpu().numpy()] = True
        per_cell = mask.reshape(grid.t, -1).sum(1)
        return {
            "kept_per_cell": [int(count) for count in per_cell],
            "kept_mask": base64.b64encode(np.packbits(mask).tobytes()).decode(),
        }
