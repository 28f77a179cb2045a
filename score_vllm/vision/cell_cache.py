"""Tower outputs of temporal cells, kept across videos: bounded in bytes, the least recently used go first.

Every decision follows from the keys and the order of the calls alone, so caches that see the same calls (the ranks of a
tensor-parallel group) hold the same cells.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class BrokenFlags:
    """Which of some cells hold a value that is not finite.

    Args:
        flags: [M] bool on the device of the cells; read from a GPU when somebody asks.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self._flags = flags
        self._copied: torch.cuda.Event | None = None
        if flags.is_cuda:
            host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            self._flags = host.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __getitem__(self, index: int) -> bool:
        if self._copied is not None:
            # Waits and does not ask whether it is there yet: what is there already differs between ranks.
            self._copied.synchronize()
            self._copied = None
        return bool(self._flags[index])

    def now(self, index: int) -> bool:
        """True where a cell is known to be broken without waiting for a GPU."""
        return self._copied is None and self[index]


@dataclass(slots=True)
class _Entry:
    """A cell: its rows in the stores, the values that it has there, and where it says whether it is broken."""

    rows: np.ndarray
    names: frozenset[str]
    flags: BrokenFlags
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class CellPlan:
    """What of one video must be encoded.

    Attributes:
        keys: [T], of its cells; empty without a cache.
        missing: [M] cells to encode, ascending; of a key that the video has several times, the first.
        order: [T], for every cell its place among the known cells and, behind them, the missing ones.
        known: by name, values of the known cells [H, N, ...], read already; empty where H = 0.
    """

    keys: tuple[bytes, ...]
    missing: list[int]
    order: np.ndarray
    known: dict[str, torch.Tensor]

    @classmethod
    def of_all(cls, count: int) -> CellPlan:
        """Encode every one of so many cells."""
        return cls((), list(range(count)), np.arange(count), {})

    def join(self, fresh: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name, values of all T cells.

        Args:
            fresh: by name, values of the missing cells [M, N, ...]; empty where M = 0.

        Returns:
            [T, N, ...] each; not copied where all cells were missing, or all known, each once.
        """
        in_order = bool((self.order == np.arange(len(self.order))).all())
        out = {}
        for name in fresh or self.known:
            parts = [part[name] for part in (self.known, fresh) if name in part]
            values = parts[0] if len(parts) == 1 else torch.cat(parts)
            out[name] = values if in_order else values.index_select(0, device_index(self.order, values.device))
        return out


class CellCache:
    """Rows of cells, in tensors that are allocated once.

    Args:
        stores: by name the values of a row, [rows, ...] of one length, on the device where they are used.

    Raises:
        ValueError: the stores differ in length.
    """

    def __init__(self, stores: Mapping[str, torch.Tensor]) -> None:
        lengths = {len(store) for store in stores.values()}
        if len(lengths) != 1:
            raise ValueError(f"the stores of a cell cache must have one length, got {sorted(lengths)}")
        self._stores = dict(stores)
        self._row_bytes = sum(store[:1].numel() * store.element_size() for store in stores.values())
        self._num_rows = lengths.pop()
        self.clear()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        """Of the cells that are held."""
        return (self._num_rows - self._num_free) * self._row_bytes

    def clear(self) -> None:
        """Forget every cell."""
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._free = np.arange(self._num_rows)  # a stack of rows, as high as _num_free
        self._num_free = self._num_rows

    def plan(self, keys: Sequence[bytes], names: Collection[str]) -> CellPlan:
        """Look up the cells of one video, and read those that are held.

        Args:
            keys: [T].
            names: values that are needed; a cell that lacks one is missing.
        """
        found: dict[bytes, _Entry] = {}
        missing: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key in found or key in missing:
                continue
            entry = self._entries.get(key)
            if entry is not None and entry.flags[entry.index]:
                self._drop(key)
                entry = None
            if entry is None or not entry.names.issuperset(names):
                missing[key] = index
            else:
                found[key] = entry
                self._entries.move_to_end(key)
        known: dict[str, torch.Tensor] = {}
        if found:
            rows = np.concatenate([entry.rows for entry in found.values()])
            for name in names:
                store = self._stores[name]
                read = store.index_select(0, device_index(rows, store.device))
                known[name] = read.view(len(found), -1, *store.shape[1:])
        place = {key: number for number, key in enumerate([*found, *missing])}
        return CellPlan(tuple(keys), list(missing.values()), np.array([place[key] for key in keys]), known)

    def put(self, plan: CellPlan, fresh: Mapping[str, torch.Tensor], flags: BrokenFlags) -> None:
        """Keep what was encoded, as far as there is room for it beside the video's other cells.

        Args:
            plan: of the video.
            fresh: by name, values of its missing cells [M, N, ...].
            flags: of the missing cells. A broken one is not kept; where only the GPU knows yet, it is dropped when it
                is looked up.
        """
        count, per_cell = next(iter(fresh.values())).shape[:2]
        own = set(plan.keys)
        stored: list[int] = []
        for number in range(count):
            key = plan.keys[plan.missing[number]]
            held = self._entries.pop(key, None)  # without one of the values, or of the same video in the same batch
            if held is None and not flags.now(number) and self._make_room(per_cell, own):
                self._num_free -= per_cell
                held = _Entry(self._free[self._num_free :][:per_cell].copy(), frozenset(), flags, number)
            if held is None:
                continue
            held.names, held.flags, held.index = held.names.union(fresh), flags, number
            self._entries[key] = held
            if flags.now(number):
                self._drop(key)
            else:
                stored.append(number)
        if not stored:
            return
        rows = np.concatenate([self._entries[plan.keys[plan.missing[number]]].rows for number in stored])
        for name, values in fresh.items():
            store = self._stores[name]
            kept = values if len(stored) == count else values.index_select(0, device_index(stored, values.device))
            store.index_copy_(0, device_index(rows, store.device), kept.flatten(0, 1))

    def _make_room(self, count: int, own: Collection[bytes]) -> bool:
        """Drop the least recently used cells until ``count`` rows are free; False where only ``own`` ones are left, and
        where there are not so many rows at all."""
        if count > self._num_rows:
            return False
        while self._num_free < count:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in own:
                return False
            self._drop(oldest)
        return True

    def _drop(self, key: bytes) -> None:
        rows = self._entries.pop(key).rows
        self._free[self._num_free :][: len(rows)] = rows
        self._num_free += len(rows)


def count_distinct(keys: torch.Tensor) -> int:
    """How many different keys are among [T, ...]: no more cells of a video than that are encoded."""
    return len({row.tobytes() for row in keys.cpu().numpy()})


def device_index(rows: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """[n] int64 on the device, without waiting for it."""
    index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
