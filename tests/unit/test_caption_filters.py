"""Each reason on text that has it, and on text that comes close."""

from __future__ import annotations

from typing import Any

import pytest

from score_vllm.train.annotate.filters import REASONS, CaptionFilter, clean, repeated_part, words_of

PROMPT = "Describe this video in detail."
GOOD = "A diver in a black suit swims along a reef, then turns towards a group of small yellow fish."


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "A man says he is sorry, and that he cannot see the video.",
        "I am afraid of heights, says a woman on a ladder.".replace("I am afraid", "She is afraid"),
        "The video shows a cat; the cat sleeps, the cat wakes, the cat eats and the cat leaves.",
        "Eine Frau läuft über die Brücke, während Züge unter ihr vorbeifahren.",
        "一个男人在厨房里切菜, 然后把它们放进锅里。",
        "Un homme 🙂 marche lentement dans la rue déserte.",
        "In detail, this video has a dog that runs after a red ball.",
        "A. A man opens the door and leaves.",
    ],
)
def test_good_answers(text: str) -> None:
    assert CaptionFilter().reason(text, PROMPT) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (None, "not_text"),
        (["A dog runs."], "not_text"),
        ("A dog \ufffd\ufffd runs over the green field.", "not_text"),
        ("A dog \x00 runs over the green field.", "not_text"),
        ("!!! ... ??? --- *** ### a b c d e f", "not_text"),
        ("A dog runs over the field.<|im_end|>", "special_tokens"),
        ("<video> A dog runs over the field.", "special_tokens"),
        ("A dog runs.", "too_short"),
        ("一只狗。", "too_short"),
        ("word " * 50 + GOOD, "repeated"),
        ((GOOD + " ") * 3, "repeated"),
        ("一个男人在厨房里切菜" * 4, "repeated"),
        ("I'm sorry, but I can't describe people in this video.", "refusal"),
        ("I\u2019m sorry, I do not see a video here at all.", "refusal"),
        ("Sorry, I can not watch videos, but I can read text.", "refusal"),
        ("Unfortunately, I am unable to process the video you sent.", "refusal"),
        ("I cannot directly view videos or other media files.", "refusal"),
        ("As an AI language model, I have no eyes to watch it.", "refusal"),
        ("No video was provided with your last message, it seems.", "refusal"),
        ("抱歉, 我无法观看这个视频, 请提供更多信息。", "refusal"),
        ("Describe this video in detail. A dog runs.", "prompt_echo"),
        ("A dog runs over the field. Describe this video in detail!", "prompt_echo"),
        ("this video in detail", "prompt_echo"),
    ],
)
def test_bad_answers(text: Any, reason: str) -> None:
    assert CaptionFilter().reason(text, PROMPT) == reason
    assert reason in REASONS


def test_limits_are_met_exactly() -> None:
    words = ["one", "two", "three", "four", "five", "six"]
    for number in range(1, 7):
        expected = "too_short" if number < 3 else "too_long" if number > 5 else ""
        assert CaptionFilter(min_words=3, max_words=5).reason(" ".join(words[:number]), PROMPT) == expected


def test_cut_off_answers() -> None:
    assert CaptionFilter().reason(GOOD, PROMPT, "length") == "cut_off"
    assert CaptionFilter().reason(GOOD, PROMPT, None) == ""


def test_allowed_reasons_pass_but_not_an_empty_answer() -> None:
    judge = CaptionFilter(allow=tuple(REASONS))
    assert judge.reason("\ufffd", PROMPT, "length") == ""
    assert judge.reason("", PROMPT) == "empty"
    assert judge.reason(None, PROMPT) == "not_text"
    only = CaptionFilter(allow=("too_short",))
    assert only.reason("A dog.", PROMPT) == ""
    assert only.reason("<|im_end|>", PROMPT) == "special_tokens", "the other reasons still count"


def test_repeated_part() -> None:
    assert repeated_part(["a", "b", "c", "d"], 2) == 0
    assert repeated_part(["a", "b", "a", "b"], 2) == pytest.approx(1 / 3)
    assert repeated_part(["a"], 4) == 0
    assert words_of("A dog's 2 über 猫と") == ["a", "dog", "s", "2", "über", "猫", "と"]


def test_clean() -> None:
    assert clean("<think>\nHm.\n</think>\n A dog. ") == "A dog."
    assert clean("A <think>dog</think>.") == "A <think>dog</think>."
    assert clean(None) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_words", 0), ("max_words", 4), ("ngram", 0), ("max_repeated", 1.1), ("min_letters", -1), ("allow", ("x",))],
)
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        CaptionFilter(**{field: value})
