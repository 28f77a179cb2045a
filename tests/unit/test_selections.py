"""What a worker remembers of its last selections, and for how long."""

from __future__ import annotations

import torch

from score_vllm import VideoGrid
from score_vllm.models.selections import RecentSelections
from tests.explained import explained

GRID = VideoGrid(3, 2, 5)


def test_a_selection_is_explained_as_often_as_it_is_asked_for() -> None:
    recent = RecentSelections()
    kept = torch.tensor([0, 7, 9, 10, 29])
    recent.keep("a", GRID, kept)
    recent.keep("whole", GRID, torch.arange(30))
    for _ in range(2):
        assert recent.explain("a") == explained(kept, GRID)
        assert recent.explain("whole") == explained(range(30), GRID)
    assert recent.explain("a") == {"kept_per_cell": [3, 1, 1], "kept_mask": "gWAABA=="}
    assert recent.explain("b") is None


def test_the_oldest_goes_first_by_tokens_and_by_videos() -> None:
    recent = RecentSelections(max_indices=7, max_videos=3)
    for key, count in (("a", 3), ("b", 3), ("whole", 30)):
        recent.keep(key, GRID, torch.arange(count))
    assert all(recent.explain(key) for key in ("a", "b", "whole")), "a video kept whole takes no indices"
    recent.keep("c", GRID, torch.arange(1))
    assert [key for key in ("a", "b", "whole", "c") if recent.explain(key)] == ["b", "whole", "c"]
    recent.keep("d", GRID, torch.arange(6))
    assert [key for key in ("b", "whole", "c", "d") if recent.explain(key)] == ["whole", "c", "d"]
    recent.keep("e", GRID, torch.arange(8))
    assert recent._videos == {}, "one that is too large by itself"
    assert recent._indices == 0


def test_the_same_video_again_takes_one_place() -> None:
    recent = RecentSelections(max_indices=6, max_videos=2)
    for count in (5, 2, 2):
        recent.keep("a", GRID, torch.arange(count))
    recent.keep("b", GRID, torch.arange(4))
    assert recent.explain("a") == explained(range(2), GRID)
    assert recent.explain("b") is not None
    recent.keep("", GRID, torch.arange(2))
    assert len(recent._videos) == 2


def test_nothing_else_is_kept_alive() -> None:
    recent = RecentSelections()
    workspace = torch.arange(10_000)
    recent.keep("a", GRID, workspace[3:5])
    _, held = recent._videos["a"]
    assert held is not None
    assert held.untyped_storage().nbytes() == 16
    own = torch.tensor([1, 2])
    recent.keep("b", GRID, own)
    assert recent._videos["b"][1] is own, "not copied"
