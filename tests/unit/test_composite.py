from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from score_vllm.train.data.config import source_config
from score_vllm.train.data.sources import open_source
from score_vllm.train.schema import ConfigurationError, MissingError
from score_vllm.train.world import composite as world
from score_vllm.train.world.composite import Composite, Figure, make_composite
from score_vllm.train.world.composite_source import CompositeSource, paint, view
from score_vllm.train.world.footage_items import ITEMS, PARTS


def grounds(frames: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {item.name: rng.integers(0, 90, (frames, 120, 160, 3), np.uint8) for item in ITEMS}


@settings(max_examples=40)
@given(st.integers(0, 9_999), st.sampled_from((16, 64, 256)))
def test_what_is_asked_about_comes_and_what_stands_still_does_not(index: int, num_frames: int) -> None:
    source = CompositeSource("test", num_frames=num_frames)
    scene, asked = source.scene(index)
    assert (scene, asked) == source.scene(index)
    events = (*scene.things, *scene.flashes)
    assert scene.things
    assert len({t.look for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
    for figure in events:
        assert 1 <= figure.spans[0][0] < figure.spans[-1][1] <= num_frames
        assert figure.spans[-1][0] - figure.spans[0][1] >= 3 or len(figure.spans) == 1
    for figure in scene.clutter:
        assert figure.spans == ((0, num_frames),)
        assert figure.direction == "still"
    for figure in (*events, *scene.clutter):
        for start, stop in figure.spans:
            for x, y in map(figure.box, range(start, stop)):
                assert 0 <= x <= world.SIZE - figure.size
                assert 0 <= y <= world.SIZE - figure.size
    assert len({q.text for q in asked}) == len(asked)
    come = {(t.look, t.colour) for t in scene.things}
    there = {(f.look, f.colour) for f in scene.clutter if f.colour}
    assert not come & there
    for question in asked:
        if question.kind == "came":
            colour, look = question.text.removeprefix("Did a ").split()[:2]
            assert ((look, colour) in come) == (question.answer == "yes")
            # Where look-alikes stand there, the pictures alone do not say that they did not come.
            assert question.answer == "yes" or not there or (look, colour) in there


def test_a_known_clip_word_by_word() -> None:
    moves = Figure("circle", "red", 24, ((2, 8),), 80, 10, "left", 12.0)
    twice = Figure("cross", "blue", 24, ((4, 6), (10, 12)), 10, 70)
    flashes = tuple(Figure(c, "", world.PLATE, ((t, t + 2),), 40, 40) for c, t in (("T", 1), ("A", 9)))
    still = Figure("circle", "green", 24, ((0, 16),), 80, 80)
    scene = Composite("city", 3, 16, (still,), (moves, twice), flashes)
    said = "A red circle moves left. A blue cross comes twice. The letter T, then A flashes."
    assert world.caption(scene) == said
    answers = {q.text: q.answer for q in world.questions(scene, np.random.default_rng(0))}
    assert answers["What colour is the circle that came?"] == "red"
    assert answers["How does the circle move?"] == "left"
    assert answers["How does the cross move?"] == "still"
    assert answers["How often does the cross come?"] == "twice"
    assert answers["Did a green circle come?"] == "no"
    assert answers["How many shapes came?"] == "two"
    assert answers["Which shape came last?"] == "cross"
    assert answers["Which letter flashed first?"] == "T"
    painted = paint(scene, grounds())
    assert painted.frames.shape == (16, world.SIZE, world.SIZE, 3)
    # The middle of the still circle is one patch for good; the crossing one passes through many.
    row = column = (80 + 12) // world.PATCH
    assert (painted.shown[:, row, column] == still.label).all()
    assert not painted.came[:, row, column].any()
    assert not painted.came[[0, 1]][:, :2].any()
    assert sorted(set(np.nonzero(painted.shown == moves.label)[0])) == [*range(2, 8)]
    assert sorted(set(np.nonzero(painted.shown == twice.label)[0])) == [4, 5, 10, 11]
    assert sorted(set(np.nonzero((painted.shown > 0) & painted.came)[0])) == [*range(1, 8), *range(9, 12)]
    columns = [np.nonzero(painted.shown[t] == moves.label)[1].mean() for t in range(2, 8)]
    assert columns == sorted(columns, reverse=True)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_view_of_any_length_of_footage(count: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (count, 144, 200, 3), np.uint8)
    seen = view(frames, 64, np.random.default_rng(1))
    assert seen.shape == (64, world.SIZE, world.SIZE, 3)
    # Everything moves: the clip, or the way over a photograph. Where a clip turns back, a frame may come twice.
    assert sum((a == b).all() for a, b in itertools.pairwise(seen)) <= (64 // 3 if count == 3 else 3)


def test_clutter_and_length_leave_the_number_of_events_alone() -> None:
    def mean(clutter: int | None, num_frames: int) -> tuple[float, float]:
        made = [make_composite(np.random.default_rng(i), ["city"], num_frames, clutter) for i in range(60)]
        return float(np.mean([len(m.things) for m in made])), float(np.mean([len(m.clutter) for m in made]))

    events, clutter = zip(*(mean(*how) for how in ((0, 16), (4, 16), (8, 16), (2, 256))), strict=True)
    assert max(events) - min(events) < 0.3
    assert clutter[0] == 0
    assert clutter[1] > 2
    assert clutter[2] > clutter[1] + 0.3


def test_backgrounds_of_evaluation_are_whole_other_clips() -> None:
    parts = {name: {item.name for item in items} for name, items in PARTS.items()}
    assert len(parts["held_out"]) >= 6
    assert parts["reader"] < parts["policy"]
    assert not parts["policy"] & (parts["held_out"] | parts["validation"])
    assert not parts["held_out"] & parts["validation"]
    assert len({item.digest for item in ITEMS}) == len(ITEMS)
    for split, part in (("held_out", "held_out"), ("policy", "policy"), ("anything", "policy")):
        source = CompositeSource(split)
        assert {source.scene(i)[0].background for i in range(100)} <= parts[part]


def test_a_source_of_training(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = source_config(kind="composite", limit=3, path=str(tmp_path))
    with pytest.raises(MissingError, match=r"footage --output"):
        open_source(spec)
    (tmp_path / "backgrounds").mkdir()
    for name, frames in grounds(3).items():
        np.save(tmp_path / "backgrounds" / f"{name}.npy", frames)
    source = open_source(spec)
    assert len(source) == 3
    sample = source[1]
    assert sample.frames.shape == (16, world.SIZE, world.SIZE, 3)
    assert (sample.prompt, sample.target) == source.text(1)
    assert {kind for kind, _, _ in source.questions(1)} >= {"colour", "count", "came"}
    assert torch.equal(torch.from_numpy(source[1].frames), torch.from_numpy(sample.frames))
    for split in ("held_out", "reader"):
        with pytest.raises(ConfigurationError, match="not for policies"):
            open_source(source_config(kind="composite", split=split, path=str(tmp_path)))
