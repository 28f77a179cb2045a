"""The cell cache gives back what was put, holds its bound, and forgets the least recently used cells first."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from score_vllm.vision.cell_cache import BrokenFlags, CellCache, count_distinct

WIDTH, ROWS = 3, 24
NAMES = ("rows", "frame")


def make(rows: int = ROWS) -> CellCache:
    return CellCache({"rows": torch.empty(rows, WIDTH), "frame": torch.empty(rows)})


def size(key: int) -> int:
    """Rows of a cell: its grid is part of its identity."""
    return 1 + key % 3


def tower(keys: list[int], names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    """What the tower makes of cells of one size."""
    rows = torch.tensor([[[key, row, 7.0] for row in range(size(keys[0]))] for key in keys])
    return {name: values for name, values in (("rows", rows), ("frame", rows[..., 0] + 0.5)) if name in names}


def flags_of(fresh: dict[str, torch.Tensor]) -> BrokenFlags:
    return BrokenFlags(~torch.isfinite(fresh["rows"].flatten(1).sum(1)))


def encode(cache: CellCache, cells: list[int], names: tuple[str, ...] = NAMES) -> tuple[list[int], dict]:
    """One video as the worker goes about it: ``(keys encoded, values)``."""
    plan = cache.plan([str(key).encode() for key in cells], names)
    keys = [cells[index] for index in plan.missing]
    fresh = tower(keys, names) if keys else {}
    if fresh:
        cache.put(plan, fresh, flags_of(fresh))
    return keys, plan.join(fresh)


def check(cells: list[int], values: dict[str, torch.Tensor], names: tuple[str, ...] = NAMES) -> None:
    expected = tower(cells, names)
    assert set(values) == set(expected)
    for name in expected:
        assert torch.equal(values[name], expected[name])


class Model:
    """The rule in plain words: an ordered dict of sizes."""

    def __init__(self) -> None:
        self.held: OrderedDict[int, int] = OrderedDict()

    def encode(self, cells: list[int]) -> list[int]:
        distinct = list(dict.fromkeys(cells))
        missing = [key for key in distinct if key not in self.held]
        for key in distinct:
            if key in self.held:
                self.held.move_to_end(key)
        for key in missing:
            while sum(self.held.values()) + size(key) > ROWS and self.held and next(iter(self.held)) not in distinct:
                self.held.popitem(last=False)
            if sum(self.held.values()) + size(key) <= ROWS:
                self.held[key] = size(key)
        return missing


videos = st.lists(
    st.integers(0, 2).flatmap(lambda kind: st.lists(st.integers(0, 9).map(lambda n: 3 * n + kind), min_size=1)),
    min_size=1,
    max_size=30,
)


@given(videos)
def test_values_bound_and_eviction_follow_the_rule(sequence: list[list[int]]) -> None:
    cache, model = make(), Model()
    for cells in sequence:
        encoded, values = encode(cache, cells)
        assert encoded == model.encode(cells)
        check(cells, values)
        assert len(cache) == len(model.held)
        assert cache.used_bytes == sum(model.held.values()) * 4 * (WIDTH + 1) <= ROWS * 4 * (WIDTH + 1)


@given(videos)
def test_two_caches_that_see_the_same_calls_decide_alike(sequence: list[list[int]]) -> None:
    """As the ranks of a tensor-parallel group must: a rank that encodes other cells would wait for ever."""
    ranks = make(), make()
    for cells in sequence:
        one, other = (encode(cache, cells)[0] for cache in ranks)
        assert one == other


def test_a_cell_larger_than_the_cache_costs_no_other_its_place() -> None:
    cache = make(2)
    encode(cache, [0, 3])
    assert encode(cache, [2])[0] == [2], "three rows"
    assert len(cache) == 2
    assert encode(cache, [0, 3])[0] == []


def test_nothing_is_copied_where_all_is_new_or_in_order() -> None:
    cache = make()
    plan = cache.plan([b"0", b"3"], NAMES)
    fresh = tower([0, 3])
    assert plan.join(fresh)["rows"] is fresh["rows"]
    cache.put(plan, fresh, flags_of(fresh))
    again = cache.plan([b"0", b"3"], NAMES)
    assert again.missing == []
    assert again.join({})["rows"] is again.known["rows"]


def test_a_cell_that_lacks_a_value_is_encoded_and_gains_it() -> None:
    cache = make()
    assert encode(cache, [4], ("rows",))[0] == [4]
    used = cache.used_bytes
    encoded, values = encode(cache, [4])
    assert encoded == [4]
    check([4], values)
    assert cache.used_bytes == used, "it takes the same rows"
    for names in (NAMES, ("rows",), ("frame",)):
        assert encode(cache, [4], names)[0] == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_cell_is_not_kept(poison: float) -> None:
    cache = make()
    plan = cache.plan([b"0", b"3", b"6"], ("rows",))
    fresh = tower([0, 3, 6], ("rows",))
    fresh["rows"][1, 0, 2] = poison
    cache.put(plan, fresh, flags_of(fresh))
    assert len(cache) == 2
    assert cache.plan([b"0", b"3", b"6"], ("rows",)).missing == [1]
    healed, values = encode(cache, [0, 3, 6])
    assert healed == [0, 3, 6], "the others lack a value now asked for"
    check([0, 3, 6], values)


def test_a_cell_that_a_gpu_finds_poisoned_later_is_dropped_when_it_is_asked_for() -> None:
    class Late(BrokenFlags):
        def now(self, index: int) -> bool:
            return False

    cache = make()
    plan = cache.plan([b"0", b"3"], ("rows",))
    fresh = tower([0, 3], ("rows",))
    cache.put(plan, fresh, Late(torch.tensor([False, True])))
    assert len(cache) == 2
    assert cache.plan([b"0", b"3"], ("rows",)).missing == [1]
    assert len(cache) == 1


def test_a_video_larger_than_the_cache_keeps_its_beginning() -> None:
    cache = make(4)
    long = [3 * n for n in range(9)]
    assert encode(cache, long)[0] == long
    assert len(cache) == 4
    assert encode(cache, long)[0] == long[4:]


def test_clear_frees_every_row() -> None:
    cache = make()
    encode(cache, [2, 5, 8])
    cache.clear()
    assert (len(cache), cache.used_bytes) == (0, 0)
    assert encode(cache, [2])[0] == [2]


def test_stores_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        CellCache({"rows": torch.empty(3, 2), "frame": torch.empty(2)})


def test_distinct_keys_are_counted() -> None:
    keys = torch.from_numpy(np.array([[1, 2], [1, 2], [2, 1]]))
    assert count_distinct(keys) == 2
