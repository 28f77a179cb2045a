"""Answers are read where they are stated, and never guessed."""

from __future__ import annotations

import pytest

from benchmarks.public.extract import extract_answer

OPTIONS = ("Apples.", "Red car", "Red", "The three kinds are of the same number.")

STATED = {
    "C": "C", "c": "C", " (B) ": "B", "B.": "B", "b)": "B", "**B**": "B", "A": "A", "A.": "A", "a": "A",
    "The answer is C because of D.": "C",
    "the answer is a.": "A",
    "The answer is A because of B": "A",
    "The best answer is: D. The three kinds": "D",
    "The correct option is (d).": "D",
    "Best Option: (C": "C",
    "Answer: B": "B",
    "Answer:D": "D",
    "the final answer is: b": "B",
    'The answer is "B".': "B",
    "The answer should be (B).": "B",
    "I would go with option C": "C",
    "I\u2019d say (B)": "B",
    r"$\boxed{B}$": "B",
    "<answer>B</answer>": "B",
    "C) Red": "C",
    "B: Red car": "B",
    "A Apples": "A",
    "A, because it moves": "A",
    "C. because D. is wrong": "C",
    "D is correct": "D",
    "B\n\nThe car is red": "B",
    "<think>maybe A or B</think>C": "C",
    "The three kinds are of the same number": "D",
    "the answer is apples": "A",
    "It is apples": "A",
    "It is red.": "C",
    "a red car passes": "B",
    "A red car": "B",
}  # fmt: skip

NOT_STATED = [
    "",
    "   ",
    "E",
    "The answer is E",
    "I",
    "The answer is a dog",
    "The answer is A dog",
    "I think it is Apple",
    "A man is walking",
    "Vitamin C",
    "The answer is B or C.",
    "The answer is A or B",
    "(A) or (B)",
    "B and C",
    "B, C",
    "B/C",
    "The answer is B. The answer is C.",
    "A. Apples.\nB. Red car\nC. Red",
    "Options A and B are wrong, so C",
    "The answer is not B",
    "Not B.",
    "It is not red",
    "It isn\u2019t red",
    "<think>The answer is A",
    "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error",
]


@pytest.mark.parametrize(("text", "letter"), STATED.items(), ids=repr)
def test_stated(text: str, letter: str) -> None:
    assert extract_answer(text, OPTIONS) == letter


@pytest.mark.parametrize("text", NOT_STATED, ids=repr)
def test_not_stated(text: str) -> None:
    assert extract_answer(text, OPTIONS) is None


def test_equal_options_are_not_told_apart_by_text() -> None:
    assert extract_answer("red", ("Red", "red", "Blue")) is None
    assert extract_answer("B", ("Red", "red", "Blue")) == "B"


def test_too_many_options() -> None:
    with pytest.raises(ValueError, match="at most 10 options"):
        extract_answer("A", ["x"] * 11)


@pytest.mark.parametrize(
    ("text", "letter"),
    {
        "Option B": "B",
        "Answer B.": "B",
        "It's B.": "B",
        "The option A, because it moves": "A",
        "It is C since it is red.": "C",
        "Option B and C": None,
        "Option B is wrong": None,
        "It's a dog": None,
        "It is A dog": None,
    }.items(),
    ids=repr,
)
def test_named_without_a_verb(text: str, letter: str | None) -> None:
    assert extract_answer(text, ("one", "two", "three")) == letter


def test_a_decimal_point_ends_no_sentence() -> None:
    options = ("3", "3.5", "4")
    assert extract_answer("The answer is 3.5.", options) == "B"
    assert extract_answer("The answer is 3. It is clear.", options) == "A"
    assert extract_answer("The answer is 3.7.", options) is None
