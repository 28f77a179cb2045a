"""The worker's half of the cell cache: which cells of a video the tower encodes, decided alike in every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from score_vllm.models.cell_records import EncodedCellsWriter
from score_vllm.models.timing import CompressorStats
from score_vllm.vision.cell_cache import BrokenFlags, CellCache, CellPlan

# The tower's output among the values of a cell; the others are kinds of saliency.
ROWS = "rows"

# Values of some cells by name, [M, N, ...] each.
Values = dict[str, torch.Tensor]


class CellEncoder:
    """Runs the tower on the cells of a video whose output is not at hand.

    Args:
        capacity: bytes of the cache; 0 encodes every cell of every video.
        width: W, columns of the tower's output.
        kinds: of saliency that are kept beside it.
        dtype, device: of the tower's output.
        stats: counts cells.
        records: says to the API process what was encoded of each video.
    """

    def __init__(
        self,
        capacity: int,
        width: int,
        kinds: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
        stats: CompressorStats,
        records: EncodedCellsWriter,
    ) -> None:
        self._stats, self._records = stats, records
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {ROWS: ((width,), dtype)}
        shapes |= dict.fromkeys(kinds, ((), torch.float32))
        per_row = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
        rows = capacity // per_row
        self.stores = {
            name: torch.empty(rows, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self._cache = CellCache(self.stores) if rows else None

    def clear(self) -> None:
        """Forget every cell: the tower's weights are others, or only what the memory profile encoded is there."""
        if self._cache is not None:
            self._cache.clear()

    def encode(
        self, keys: torch.Tensor, ticket: int, names: Iterable[str], tower: Callable[[list[int]], Values]
    ) -> Values:
        """Values of all cells of a video.

        Args:
            keys: [T, 4] int64, of :func:`score_vllm.models.processing.cell_keys`.
            ticket: of the video.
            names: the values wanted.
            tower: encodes some cells.

        Returns:
            [T, N, ...] each.
        """
        plan = self.plan(keys, names)
        return self.finish(plan, ticket, tower(plan.missing) if plan.missing else {})

    def plan(self, keys: torch.Tensor, names: Iterable[str]) -> CellPlan:
        """What must be encoded; the first half of :meth:`encode`."""
        if self._cache is None:
            return CellPlan.of_all(len(keys))
        return self._cache.plan([row.tobytes() for row in keys.cpu().numpy()], tuple(names))

    def finish(self, plan: CellPlan, ticket: int, fresh: Values) -> Values:
        """Keep what was encoded and put the video together; the second half of :meth:`encode`."""
        if fresh and self._cache is not None:
            self._cache.put(plan, fresh, BrokenFlags(_broken(fresh)))
        encoded, used = len(plan.missing), 0 if self._cache is None else self._cache.used_bytes
        self._records.write(ticket, encoded)
        self._stats.count_cells(encoded, len(plan.order) - encoded, used)
        return plan.join(fresh)


def _broken(fresh: Values) -> torch.Tensor:
    """[M] bool, cells with a value that is not finite, in any rank: no rank may keep what another one drops."""
    sums = sum(values.flatten(1).sum(1, dtype=torch.float32) for values in fresh.values())
    broken = ~torch.isfinite(sums)  # type: ignore[arg-type]
    if get_tensor_model_parallel_world_size() > 1:
        broken = tensor_model_parallel_all_reduce(broken.float()) > 0
    return broken
