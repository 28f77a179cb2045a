"""A step encodes no more video than it would without compression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from score_vllm import VideoGrid, num_retained_tokens
from score_vllm.layout import grid_layout
from score_vllm.models.encoder_budget import EncodedTokensCacheManager
from score_vllm.models.processing import CELLS_KEY, LAYOUT_KEY
from tests.integration.conftest import Engine, make_video

BUDGET = 100


def feature(
    name: str, cells: int, ratio: float, key: str = "pixel_values_videos", digests: list[int] | None = None
) -> SimpleNamespace:
    """What the scheduler sees of a video of ``cells`` tokens."""
    layout = SimpleNamespace(data=grid_layout(VideoGrid(cells, 1, 1), 1.0).to_tensor())
    kept = num_retained_tokens(cells, ratio)
    keys = torch.tensor(range(cells) if digests is None else digests)[:, None]
    data = {key: SimpleNamespace(data=None), LAYOUT_KEY: layout, CELLS_KEY: SimpleNamespace(data=keys)}
    position = SimpleNamespace(get_num_embeds=lambda: kept)
    return SimpleNamespace(data=data, identifier=name, mm_position=position)


def request(name: str, *features: SimpleNamespace) -> Any:
    """The parts of a vLLM request that a cache manager reads."""
    count = lambda i: features[i].mm_position.get_num_embeds()  # noqa: E731
    return SimpleNamespace(request_id=name, mm_features=list(features), get_num_encoder_embeds=count)


def schedule(manager: EncoderCacheManager, requests: list[Any]) -> list[str]:
    """One step as vLLM's scheduler goes about it; names of the videos that it encodes."""
    budget, encoded = BUDGET, []
    for one in requests:
        chosen, kept = [], 0
        for i, item in enumerate(one.mm_features):
            if manager.check_and_update_cache(one, i):
                continue
            if not manager.can_allocate(one, i, budget, kept):
                break
            chosen.append(i)
            kept += item.mm_position.get_num_embeds()
            budget -= item.mm_position.get_num_embeds()
        for i in chosen:
            manager.allocate(one, i)
            encoded.append(one.mm_features[i].identifier)
    manager.get_freed_mm_hashes()
    return encoded


@given(
    st.lists(st.lists(st.integers(1, 150), min_size=1, max_size=3), min_size=1, max_size=8),
    st.sampled_from([0.05, 0.1, 0.4, 1.0]),
)
def test_no_step_encodes_more_than_its_budget_and_all_are_encoded(sizes: list[list[int]], ratio: float) -> None:
    """Except by its first video, which may be larger than the budget; nobody waits for ever."""
    manager = EncodedTokensCacheManager(10**6)
    cells = {f"{r}-{i}": n for r, videos in enumerate(sizes) for i, n in enumerate(videos) if ratio < 1 or n <= BUDGET}
    requests = [
        request(str(r), *[feature(f"{r}-{i}", n, ratio) for i, n in enumerate(videos) if f"{r}-{i}" in cells])
        for r, videos in enumerate(sizes)
    ]
    done: list[str] = []
    while len(done) < len(cells):
        encoded = schedule(manager, requests)
        assert encoded, "a step without progress"
        assert len(encoded) == 1 or sum(cells[name] for name in encoded) <= BUDGET
        done += encoded
    assert sorted(done) == sorted(cells)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=40), min_size=1, max_size=8), st.booleans())
def test_a_video_is_charged_for_its_distinct_cells_and_never_for_less_than_is_encoded(
    videos: list[list[int]], reuses: bool
) -> None:
    """The workers' cache may know some of them: that can only make it less."""
    manager = EncodedTokensCacheManager(10**6, reuses)
    requests = [request(str(n), feature(str(n), len(v), 1.0, digests=v)) for n, v in enumerate(videos)]
    for one, cells in zip(requests, videos, strict=True):
        at_ratio_one = one.get_num_encoder_embeds(0)
        assert manager._surcharge(one, 0) + at_ratio_one >= len(set(cells))
    thin = [request(f"t{n}", feature(f"t{n}", len(v), 1e-9, digests=v)) for n, v in enumerate(videos)]
    for one, cells in zip(thin, videos, strict=True):
        encoded = len(set(cells)) if reuses else len(cells)
        assert manager._surcharge(one, 0) == encoded - 1, "a token is kept, which vLLM charges itself"


def test_at_ratio_one_it_decides_as_vllm_does() -> None:
    requests = [request(str(n), feature(str(n), 30, 1.0)) for n in range(5)]
    assert schedule(EncodedTokensCacheManager(10**6), requests) == ["0", "1", "2"]
    assert schedule(EncoderCacheManager(10**6), requests) == ["0", "1", "2"]


def test_precomputed_embeddings_cost_nothing_more() -> None:
    requests = [request(str(n), feature(str(n), 60, 0.1, key="video_embeds")) for n in range(5)]
    assert len(schedule(EncodedTokensCacheManager(10**6), requests)) == 5


def test_a_video_that_the_scheduler_does_not_see_gets_a_step_of_its_own() -> None:
    """vLLM's shared-memory cache shows the scheduler no sizes."""
    unseen = [feature(str(n), 60, 0.1) for n in range(2)]
    for item in unseen:
        item.data, item.modality = None, "video"
    image = feature("image", 10, 1.0)
    image.data, image.modality = None, "image"
    manager = EncodedTokensCacheManager(BUDGET)
    requests = [request(item.identifier, item) for item in (image, *unseen)]
    assert [schedule(manager, requests) for _ in range(3)] == [["image"], ["0"], ["1"]]


def test_space_is_charged_by_kept_tokens() -> None:
    """A cache of 12 rows holds two videos of 6 kept tokens, whatever they had before."""
    requests = [request(str(n), feature(str(n), 6 * 8, 1 / 8)) for n in range(3)]
    assert schedule(EncodedTokensCacheManager(12), requests) == ["0", "1"]


@pytest.mark.parametrize(("manager", "most"), [(EncoderCacheManager, 2), (EncodedTokensCacheManager, 1)])
def test_in_the_real_scheduler(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, manager: type[EncoderCacheManager], most: int
) -> None:
    """Three videos of 64 tokens at a tenth: vLLM's own count lets two into a step of 16 prompt tokens, ours one."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    own = scheduler.encoder_cache_manager
    assert type(own) is EncodedTokensCacheManager, "the engine did not take --ec-manager-config"
    assert own._reuses_cells, "the engine has a cell cache"
    made = manager.__new__(manager)
    made.__dict__.update(own.__dict__)
    monkeypatch.setattr(scheduler, "encoder_cache_manager", made)
    monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", BUDGET)
    steps: list[int] = []
    schedule_step = scheduler.schedule

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = schedule_step(*args, **kwargs)
        steps.append(sum(len(ids) for ids in out.scheduled_encoder_inputs.values()))
        return out

    monkeypatch.setattr(scheduler, "schedule", spy)
    prompt = "<|vision_start|><|video_pad|><|vision_end|>"
    first = 7000 if manager is EncoderCacheManager else 7100
    asked = [
        {
            "prompt": prompt,
            "multi_modal_data": {"video": [make_video(8, 112, 112, first + n)]},
            "mm_processor_kwargs": {"retention_ratio": 0.1},
        }
        for n in range(3)
    ]
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    try:
        outputs = engine.llm.generate(asked, params, use_tqdm=False)
    finally:
        own.__dict__.update(made.__dict__)  # the engine lives on
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 2, 2]
    assert max(steps) == most
    assert sum(steps) == 3
