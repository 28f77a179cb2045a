"""FastVID's counts, worked out by hand from its description; the recorded runs have no segment this long."""

from __future__ import annotations

import pytest

from score_vllm.methods.fastvid_plan import DEFAULTS, Settings, find_segments, plan_exact, plan_reference

# One segment of 7 frames: frame 2 is like frame 3 and ends no run, the other six end one each.
ALIKE, UNLIKE = 0.97, 0.9
SIMILARITY = [UNLIKE, UNLIKE, ALIKE, UNLIKE, UNLIKE, UNLIKE]
ONE_SEGMENT = Settings(c=1)


def test_runs_share_and_the_last_is_always_an_anchor() -> None:
    plan = plan_reference(SIMILARITY, 40, 0.25, "qwen25vl", ONE_SEGMENT)
    # 10 tokens a frame make 70: 28 of context over two anchors (6 runs, every fourth), 42 salient over 6 runs.
    # The anchors are runs 0 and 4 of the reversed list, so runs 5 and 1: frames 6 and 1.
    assert plan.segments == [(0, 7)]
    assert plan.context == [0, 14, 0, 0, 0, 0, 14]
    assert plan.salient == [7, 7, 0, 7, 7, 7, 7]


def test_remainders_go_to_the_first_runs_and_context_to_the_reversed_list() -> None:
    plan = plan_reference(SIMILARITY, 40, 0.225, "qwen25vl", ONE_SEGMENT)
    # 9 a frame make 63: 25 of context as 13 and 12, reversed; 38 salient as 7, 7, 6, 6, 6, 6.
    assert plan.context == [0, 12, 0, 0, 0, 0, 13]
    assert plan.salient == [7, 7, 0, 6, 6, 6, 6]


def test_caps_lose_budget_in_reference_mode_and_return_it_in_exact_mode() -> None:
    reference = plan_reference(SIMILARITY, 40, 0.8, "qwen25vl", ONE_SEGMENT)
    # 224 tokens: 89 of context would be 45 and 44, capped at N // 2; 135 salient in six frames.
    assert reference.context == [0, 20, 0, 0, 0, 0, 20]
    assert reference.salient == [23, 20, 0, 23, 22, 22, 20]
    exact = plan_exact(SIMILARITY, 40, 224, "qwen25vl", ONE_SEGMENT)
    assert (exact.context, exact.salient) == (reference.context, reference.salient)
    assert exact.extra == [224 - 40 - 130]


def test_a_small_ignore_threshold_joins_frames_into_runs() -> None:
    assert DEFAULTS["qwen25vl"].ignore < ALIKE < DEFAULTS["port"].ignore
    port = plan_reference(SIMILARITY, 40, 0.25, "port", Settings(c=1, ignore=0.99))
    assert all(port.salient)


def test_llavaov_anchors_count_from_the_end_and_may_absorb_only_their_own_frame() -> None:
    settings = Settings(c=1, p=3, tau=-1.0)
    plan = plan_reference(SIMILARITY, 40, 0.25, "llavaov", settings)
    # Of 10 a frame 4 are context: 28 over the frames 6, 3 and 0, 9 each, one lost.
    assert plan.context == [9, 0, 0, 9, 0, 0, 9]
    assert plan.salient == [6] * 7
    assert plan.own_frame == [False]
    # Three frames with anchors at 2 and 0: 1 * 3 // 2 = 1 is a frame's own share.
    small = plan_reference([UNLIKE] * 2, 40, 0.08, "llavaov", Settings(c=1, p=2, tau=-1.0))
    assert (small.context, small.own_frame) == ([1, 0, 1], [True])


@pytest.mark.parametrize(
    ("c", "tau", "edges"),
    [(1, 0.0, [7]), (2, 0.0, [1, 6]), (3, 0.0, [1, 1, 5]), (1, 0.95, [1, 1, 2, 1, 1, 1]), (1, 0.99, [1] * 7)],
)
def test_segments_are_cut_at_the_least_similar_and_below_tau(c: int, tau: float, edges: list[int]) -> None:
    # The first of equals is cut first.
    assert [stop - start for start, stop in find_segments(SIMILARITY, c, tau)] == edges
