from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from score_vllm.train.schema import ConfigurationError
from score_vllm.train.world import scenes as world
from score_vllm.train.world.render import FIRST_FLASH, plate, render, shape_mask, write_clip
from score_vllm.train.world.scenes import Flash, Scene, Thing


def scene_of(index: int, split: str = "test") -> Scene:
    return world.make_clip(split, index)[0]


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_nothing_covers_anything_and_everything_stays_in_the_picture(index: int) -> None:
    scene = scene_of(index)
    boxes = [(t.start, t.stop, [(*t.box(f), t.size) for f in range(t.start, t.stop)]) for t in scene.things]
    boxes += [(f.start, f.stop, [(f.x, f.y, world.PLATE_SIZE)] * (f.stop - f.start)) for f in scene.flashes]
    for i, (start, stop, mine) in enumerate(boxes):
        assert all(0 <= x <= world.FRAME_SIZE - s and 0 <= y <= world.FRAME_SIZE - s for x, y, s in mine)
        assert 0 <= start < stop <= scene.num_frames
        for other_start, other_stop, other in boxes[:i]:
            for frame in range(max(start, other_start), min(stop, other_stop)):
                (ax, ay, a), (bx, by, b) = mine[frame - start], other[frame - other_start]
                assert ax + a <= bx or bx + b <= ax or ay + a <= by or by + b <= ay


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_every_question_has_one_answer_that_the_picture_shows(index: int) -> None:
    scene, asked = world.make_clip("test", index)
    seen = render(scene).seen
    assert len({t.shape for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
    assert len({f.letter for f in scene.flashes}) == len(scene.flashes)
    for i in range(len(scene.things)):
        assert (seen == i + 1).any(), "a shape that is asked about is seen"
    for i, flash in enumerate(scene.flashes):
        frames = (seen == FIRST_FLASH + i).any((1, 2))
        assert frames.tolist() == [flash.start <= f < flash.stop for f in range(scene.num_frames)]
    starts = [flash.start for flash in scene.flashes]
    assert starts == sorted(starts)
    answers = {q.text: q.answer for q in asked}
    assert len(answers) == len(asked)
    for question in asked:
        if question.kind == "count" and "letters" in question.text:
            assert question.answer == world.NUMBERS[len(scene.flashes)]
        if question.kind == "place":
            thing = next(t for t in scene.things if t.shape in question.text)
            rows, columns = np.nonzero(seen[thing.start] == scene.things.index(thing) + 1)
            half = world.FRAME_SIZE / 2
            place = f"{'bottom' if rows.mean() > half else 'top'} {'right' if columns.mean() > half else 'left'}"
            assert question.answer == place


def test_known_scene_word_by_word() -> None:
    scene = Scene(
        0,
        8,
        (Thing("circle", "orange", "left", 50, 0, 8, 100, 20, 4), Thing("ring", "red", "still", 50, 2, 8, 10, 160, 0)),
        (Flash("K", 1, 2, 5, 5), Flash("A", 5, 7, 5, 5)),
    )
    assert world.caption(scene) == (
        "An orange circle moves left. A red ring stays at the bottom left. The letter K, then A flashes."
    )
    answers = {q.answer for q in world.questions(scene, np.random.default_rng(0))}
    assert answers == {"orange", "red", "circle", "ring", "left", "still", "bottom left", "two", "K", "A"}
    kinds = {q.kind for q in world.questions(scene, np.random.default_rng(0))}
    assert kinds == {"colour", "shape", "direction", "place", "order", "count"}


def test_moving_left_moves_left() -> None:
    seen = render(Scene(0, 6, (Thing("square", "blue", "left", 50, 0, 6, 150, 80, 5),), ())).seen
    centres = [np.nonzero(frame == 1)[1].mean() for frame in seen]
    assert np.diff(centres) == pytest.approx(-5, abs=0.51)


def test_same_split_and_index_give_the_same_pixels_and_others_do_not() -> None:
    first, again = render(scene_of(3)).frames, render(scene_of(3)).frames
    assert np.array_equal(first, again)
    assert not np.array_equal(first, render(scene_of(4)).frames)
    assert not np.array_equal(first, render(scene_of(3, "other")).frames)


@pytest.mark.parametrize("index", range(6))
def test_pseudo_video_is_two_to_four_stills_of_three_to_six_equal_frames(index: int) -> None:
    sample = world.PseudoWorldSource("test", 10)[index]
    changes = np.nonzero((sample.frames[1:] != sample.frames[:-1]).any((1, 2, 3)))[0] + 1
    lengths = np.diff([0, *changes, len(sample.frames)])
    assert 2 <= len(lengths) <= 4
    assert set(lengths) <= {4, 6}, "whole cells of the tower"
    assert sample.target.count(".") == len(lengths), "one caption per still"


def test_source_is_a_training_source_and_refuses_the_held_out_split() -> None:
    source = world.WorldSource("test", 5)
    assert len(source) == 5
    assert source[2].target == world.caption(scene_of(2))
    with pytest.raises(IndexError):
        source[5]
    with pytest.raises(ConfigurationError, match="held_out"):
        world.WorldSource("held_out")
    with pytest.raises(ValueError, match="num_frames must be at least 6, got 4"):
        world.make_scene(np.random.default_rng(0), 4)


def test_shapes_and_letters_differ() -> None:
    masks = [shape_mask(shape, 48) for shape in world.SHAPES]
    plates = [plate(letter) for letter in world.LETTERS]
    for i in range(len(masks)):
        assert all((masks[i] != masks[j]).mean() > 0.05 for j in range(i))
    for i in range(len(plates)):
        assert all((plates[i] != plates[j]).mean() > 0.02 for j in range(i))
    with pytest.raises(ValueError, match="'blob' is unknown"):
        shape_mask("blob", 48)


def test_written_clip_reads_back_nearly_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from score_vllm.video import decode_video

    frames = render(scene_of(1)).frames
    write_clip(frames, tmp_path / "clip.mp4")
    read = decode_video((tmp_path / "clip.mp4").read_bytes()).frames
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 6
