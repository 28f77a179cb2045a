"""Feature cache, data order, checkpoints: what is kept, bounded, and given back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from score_vllm.layout import grid_layout
from score_vllm.policy import RetentionPolicy
from score_vllm.train.checkpoint import (
    TrainState,
    checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from score_vllm.train.config import CacheSettings, settings_from
from score_vllm.train.curriculum import StageData
from score_vllm.train.frozen.bounded_folder import SUFFIX, BoundedFolder
from score_vllm.train.frozen.feature_cache import GIB, CachedSample, FeatureCache
from score_vllm.train.frozen.model import EncodedSample
from score_vllm.train.stopping import CollapseWatch, TrainingStoppedError
from score_vllm.types import VideoGrid


def entry(number: int, cells: int = 4) -> CachedSample:
    x = torch.full((cells, 6, 32), float(number), dtype=torch.bfloat16)
    ids = torch.arange(number, number + 3)
    return CachedSample(
        EncodedSample(f"k{number}", x, grid_layout(VideoGrid(cells, 2, 3), 0.5), ids, ids, ids), number / 7
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cache_gives_back_what_it_got_within_its_bound(tmp_path: Path, kind: str) -> None:
    size = entry(0).nbytes
    room = (3.5 if kind == "memory" else 6) * size / GIB
    cache = FeatureCache(CacheSettings(kind=kind, max_gib=room), "model", tmp_path)
    for number in range(20):
        cache.put(str(number), entry(number))
        cache.get("0")
        if number == 3:
            assert cache.get("3") is not None
    held = [n for n in range(20) if str(n) in cache]
    assert 19 in held
    assert 2 <= len(held) <= 6
    if kind == "memory":
        assert held == [0, 18, 19], "the one that is used stays"
    else:
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 6 * size
    found = cache.get("19")
    assert found is not None
    assert torch.equal(found.encoded.x, entry(19).encoded.x)
    assert found.encoded.x.dtype == torch.bfloat16
    assert found.encoded.target.tolist() == [19, 20, 21]
    assert found.ce_base == 19 / 7
    assert (found.encoded.grid, found.encoded.layout.extent, found.encoded.key) == (VideoGrid(4, 2, 3), 3, "k19")


def test_processes_that_share_a_folder_share_its_bound(tmp_path: Path) -> None:
    """Each sees only its own writing, and the folder."""
    sharing = [BoundedFolder(tmp_path, 100_000) for _ in range(4)]
    most = 0
    for number in range(800):
        sharing[number % 4].put(tmp_path / f"{number:03}{SUFFIX}", lambda part: part.write_bytes(b"x" * 500))
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert 85_000 < most <= 106_000
    assert (tmp_path / f"799{SUFFIX}").is_file()
    assert not (tmp_path / f"000{SUFFIX}").exists()


def test_cache_refuses_what_is_above_its_bound_and_keeps_models_apart(tmp_path: Path) -> None:
    small = FeatureCache(CacheSettings(kind="memory", max_gib=10 / GIB), "model", tmp_path)
    small.put("a", entry(1))
    assert small.get("a") is None
    settings = CacheSettings(kind="disk")
    FeatureCache(settings, "one", tmp_path).put("a", entry(1))
    assert FeatureCache(settings, "one", tmp_path).get("a") is not None
    assert FeatureCache(settings, "other", tmp_path).get("a") is None


def test_a_damaged_cache_file_is_a_miss(tmp_path: Path) -> None:
    cache = FeatureCache(CacheSettings(kind="disk"), "model", tmp_path)
    cache.put("a", entry(1))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    assert cache.get("a") is None
    assert not path.exists()


class Rows:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the order alone is asked for")


def order(size: int, slots: range, seed: int = 0, name: str = "a") -> list[int]:
    settings = settings_from({"output": "x", "stage": {name: {"sources": [{"kind": "world"}]}}})
    cache = FeatureCache(CacheSettings(kind="none"), "", Path())
    data = StageData(Rows(size), settings.stages[0], seed, None, cache)  # type: ignore[arg-type]
    found = [data.index(slot) for slot in slots]
    data.close()
    return found


def test_every_epoch_sees_every_sample_in_its_own_order() -> None:
    first, second = order(50, range(50)), order(50, range(50, 100))
    assert sorted(first) == sorted(second) == [*range(50)]
    assert (
        len({tuple(first), tuple(second), tuple(order(50, range(50), seed=1)), tuple(order(50, range(50), 0, "b"))})
        == 4
    )
    assert order(50, range(70, 80)) == second[20:30], "a position needs nothing before it"


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_checkpoint_gives_back_weights_and_optimiser(tmp_path: Path, kind: str) -> None:
    def optimizer_of(policy: RetentionPolicy) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(policy.parameters(), lr=0.1)

    def step(policy: RetentionPolicy, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
        policy(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    policy = RetentionPolicy(8)
    names = [name for name, _ in policy.named_parameters()]
    optimizer = optimizer_of(policy)
    step(policy, optimizer, 0)
    state = TrainState(3, "main", 1, 2, 0, {}, {"seed": 1}, {})
    path = save_checkpoint(tmp_path, policy.state_dict(), optimizer_tensors(optimizer, names), state, keep=2)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    weights, tensors, found = load_checkpoint(path)
    other = RetentionPolicy(8, seed=9)
    other.load_state_dict(weights)
    restored = optimizer_of(other)
    restore_optimizer(restored, names, tensors)
    assert (found.step, found.stage, found.stage_step, found.provenance) == (3, "main", 1, {"seed": 1})
    step(policy, optimizer, 1)
    step(other, restored, 1)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_newest_checkpoints_are_kept_by_number(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        state = TrainState(step, "main", step, 1, 0, {}, {}, {})
        save_checkpoint(tmp_path, {"w": torch.ones(2)}, {}, state, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-100", "step-10", "step-9"]
    (tmp_path / "step-100" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-100 cannot be used"):
        load_checkpoint(tmp_path / "step-100")


def step_values(kept: float = 0.3, **changes: float) -> dict[str, float]:
    return {"sparsity": 1 - kept, "entropy": 0.4, "equal_masks": 0.0, "logit_spread": 1.0, **changes}


def test_collapse_needs_patience_and_a_row() -> None:
    watch = CollapseWatch(3)
    for share in (1.0, 1.0, 0.5, 0.0, 0.0):
        watch.check(step_values(kept=share), exact=False)
    with pytest.raises(TrainingStoppedError, match="keeps no token"):
        watch.check(step_values(kept=0.0), exact=False)
    forever = CollapseWatch(0)
    for _ in range(100):
        forever.check(step_values(kept=1.0), exact=False)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("sign", "words"), [({"entropy": 0.004}, "no longer varies"), ({"equal_masks": 1.0}, "the same mask every time")]
)
def test_collapse_is_seen_in_both_objectives(sign: dict[str, float], words: str, exact: bool) -> None:
    watch = CollapseWatch(2)
    for values in (step_values(), step_values(**sign), step_values(), step_values(**sign)):
        watch.check(values, exact)
    with pytest.raises(TrainingStoppedError, match=words):
        watch.check(step_values(**sign), exact)


def test_equal_scores_are_a_collapse_where_budgets_are_equal() -> None:
    watch = CollapseWatch(1)
    watch.check(step_values(logit_spread=0.0), exact=False)
    watch.check(step_values(kept=0.0), exact=True)
    with pytest.raises(TrainingStoppedError, match="same score"):
        watch.check(step_values(logit_spread=0.0), exact=True)
