"""Metrics with numbers worked out by hand, and the file of answers: torn, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.public.answers import Answers, AnswersError, ratio_name
from benchmarks.public.formats import SETS, Question
from benchmarks.public.scoring import Accuracy, score, wilson

CONFIGURATION = {"model": "demo", "prompt": "official"}


def question(number: int, *groups: str) -> Question:
    return Question(str(number), "v", ("",), "Why?", ("w", "x", "y", "z"), "", "A", groups)


def answered(number: int, text: str, ratio: str = "0.1", **fields: Any) -> dict[str, Any]:
    return {"ratio": ratio, "id": str(number), "status": "answered", "text": text, "prompt_tokens": 100, **fields}


def failed(number: int, ratio: str = "0.1") -> dict[str, Any]:
    return {"ratio": ratio, "id": str(number), "status": "failed", "error": "HTTP 500: boom"}


@pytest.fixture
def answers(tmp_path: Path) -> Any:
    opened = Answers(tmp_path / "a.jsonl", CONFIGURATION)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407), (81, 263, 0.255289, 0.366210)],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    """The last row is the example of Newcombe 1998, table I (0.2553 to 0.3662)."""
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-5)


def test_wilson_refuses_what_is_no_proportion() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="correct must be in"):
        wilson(3, 2)


def test_micro_average_and_buckets(answers: Answers) -> None:
    questions = [question(0, "short"), question(1, "short"), question(2, "long"), question(3, "long")]
    for i, text in enumerate(["A", "B", "(a)", "no idea"]):
        answers.add(answered(i, text))
    result = score(SETS["videomme"], questions, answers, 0.1, allow_failures=False)
    assert result.headline is not None
    assert (result.headline.correct, result.headline.total, result.headline.value) == (2, 4, 0.5)
    assert {k: v.value for k, v in result.groups.items()} == {"short": 0.5, "long": 0.5}
    assert (result.unanswered, result.scored, result.prompt_tokens) == (1, 4, 100)
    assert result.complete


def test_mlvu_is_the_unweighted_mean_of_the_tasks(answers: Answers) -> None:
    """3 of 4 in one task and 0 of 1 in another: 37.5, not 60."""
    questions = [*(question(i, "ego") for i in range(4)), question(4, "count")]
    for i, text in enumerate("AAABB"):
        answers.add(answered(i, text))
    result = score(SETS["mlvu"], questions, answers, 0.1, allow_failures=False)
    assert result.headline is not None
    assert result.headline.value == pytest.approx(0.375)
    assert list(result.groups) == ["ego", "count"]
    ego, count = result.groups.values()
    below = ((ego.value - ego.low) ** 2 + (count.value - count.low) ** 2) ** 0.5 / 2
    assert result.headline.low == pytest.approx(0.375 - below)


def test_lvbench_counts_a_question_once_overall_and_once_per_type(answers: Answers) -> None:
    questions = [question(0, "reasoning", "summarization"), question(1, "reasoning")]
    answers.add(answered(0, "A"))
    answers.add(answered(1, "B"))
    result = score(SETS["lvbench"], questions, answers, 0.1, allow_failures=False)
    assert result.headline is not None
    assert (result.headline.correct, result.headline.total) == (1, 2)
    assert {k: (v.correct, v.total) for k, v in result.groups.items()} == {"summarization": (1, 1), "reasoning": (1, 2)}


def test_a_failed_request_withholds_the_score(answers: Answers) -> None:
    questions = [question(0, "short"), question(1, "short"), question(2, "short")]
    answers.add(answered(0, "A"))
    answers.add(failed(1))
    withheld = score(SETS["videomme"], questions, answers, 0.1, allow_failures=False)
    assert withheld.headline is None
    assert withheld.groups == {}
    assert (withheld.failed, withheld.missing, withheld.complete) == ({"1": "HTTP 500: boom"}, 1, False)
    allowed = score(SETS["videomme"], questions, answers, 0.1, allow_failures=True)
    assert allowed.headline is not None
    assert (allowed.headline.correct, allowed.headline.total) == (1, 1), "the failed one is in neither count"
    assert not allowed.complete


def test_mixed_methods_are_seen(answers: Answers) -> None:
    for i, method in enumerate(["score", "evs"]):
        answers.add(answered(i, "A", method=method))
    result = score(SETS["videomme"], [question(0), question(1)], answers, 0.1, allow_failures=False)
    assert result.methods == ["evs", "score"]


def test_mean_of_equal_parts_is_narrower_than_each() -> None:
    part = Accuracy.of([True, False] * 20)
    mean = Accuracy.mean_of([part] * 4)
    assert mean.value == part.value
    assert mean.high - mean.low == pytest.approx((part.high - part.low) / 2)


def test_answers_survive_a_kill_inside_a_write(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Answers(path, CONFIGURATION)
    first.add(answered(0, "line\u2028separator, \ud800 and\nnewline"))
    first.add(failed(1))
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"ratio": "0.1", "id": "2", "sta')
    second = Answers(path, CONFIGURATION)
    assert second.answered("0.1", "0")
    assert not second.answered("0.1", "1"), "a failure is asked again"
    assert not second.answered("0.1", "2"), "the torn one is asked again"
    second.add(answered(1, "B"))
    second.close()
    third = Answers(path, CONFIGURATION)
    assert third.answered("0.1", "1"), "the last record of a question wins"
    assert third.records["0.1", "0"]["text"] == "line\u2028separator, \ud800 and\nnewline"
    third.close()
    assert path.read_bytes().startswith(whole)


def test_answers_of_another_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Answers(path, CONFIGURATION).close()
    before = path.read_bytes()
    with pytest.raises(AnswersError, match="another configuration \\(model: 'demo' there, 'other' asked\\)"):
        Answers(path, {**CONFIGURATION, "model": "other"})
    assert path.read_bytes() == before
    Answers(path, CONFIGURATION).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", "is not a file of answers; it stays as it is"),
        (b"my notes\n", "line 1 is not a record"),
        (b'{"configuration": {"version": 1, "model": "demo", "prompt": "official"}}\n{"id": "0"}\n', "line 2 is not"),
        (b"[]\n", "line 1 is not a record"),
    ],
)
def test_other_files_are_left_alone(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(AnswersError, match=message):
        Answers(path, CONFIGURATION)
    assert path.read_bytes() == content


def test_two_runs_cannot_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Answers(path, CONFIGURATION)
    with pytest.raises(AnswersError, match="in use by another run"):
        Answers(path, CONFIGURATION)
    first.close()
    Answers(path, CONFIGURATION).close()


def test_ratio_names() -> None:
    assert [ratio_name(r) for r in (None, 1, 1.0, 0.1)] == ["default", "1.0", "1.0", "0.1"]
    assert json.loads(ratio_name(0.25)) == 0.25
