"""Official metrics of each set over the answers at hand; failed requests are never scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.public.answers import Answers, ratio_name
from benchmarks.public.extract import extract_answer
from benchmarks.public.formats import BenchmarkSet, Question

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), as fractions; (0, 1) where nothing was counted.

    Raises:
        ValueError: not 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be in [0, total], got {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    p, zz = correct / total, Z * Z
    middle = (p + zz / (2 * total)) / (1 + zz / total)
    half = Z * math.sqrt(p * (1 - p) / total + zz / (4 * total * total)) / (1 + zz / total)
    low, high = (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its 95 % interval, all fractions; ``total`` is how many were scored."""

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Accuracy:
        """Micro average of single outcomes, at least one."""
        correct = sum(outcomes)
        return cls(correct / len(outcomes), *wilson(correct, len(outcomes)), correct, len(outcomes))

    @classmethod
    def mean_of(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """Unweighted mean of independent accuracies, at least one.

        The interval combines the parts' Wilson limits (square-and-add; Zou and Donner, Statistics in Medicine, 2008).
        """
        value = statistics.fmean(part.value for part in parts)
        below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
        above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
        correct, total = sum(part.correct for part in parts), sum(part.total for part in parts)
        return cls(value, max(0.0, value - below), min(1.0, value + above), correct, total)

    def to_json(self) -> dict[str, Any]:
        """Percentages, and the counts."""
        percent = {"accuracy": self.value * 100, "low": self.low * 100, "high": self.high * 100}
        return {**percent, "correct": self.correct, "total": self.total}


@dataclass(frozen=True)
class Score:
    """The figures of one ratio.

    Attributes:
        headline: the official figure; None where it is withheld because requests failed.
        groups: per duration, task or type, in the set's order; empty where withheld.
        scored: questions with an answer; ``unanswered`` of them name no option and count as wrong.
        failed: reason per question without an answer.
        missing: questions that were not asked, because the run stopped early.
        prompt_tokens: mean over the answers, None where the server does not report usage.
        methods: what score-serve says to have used; more than one means that the server changed between two runs.
    """

    ratio: float | None
    headline: Accuracy | None
    groups: dict[str, Accuracy]
    scored: int
    unanswered: int
    failed: dict[str, str]
    missing: int
    prompt_tokens: float | None
    methods: list[str]

    @property
    def complete(self) -> bool:
        """Whether every question has an answer."""
        return not self.failed and not self.missing

    def to_json(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "retention_ratio": ratio_name(self.ratio) if self.ratio is None else self.ratio,
            "headline": self.headline.to_json() if self.headline else None,
            "groups": {name: group.to_json() for name, group in self.groups.items()},
            "scored": self.scored,
            "unanswered": self.unanswered,
            "failed": len(self.failed),
            "failures": self.failed,
            "not_asked": self.missing,
            "prompt_tokens_mean": self.prompt_tokens,
            "methods": self.methods,
            "complete": self.complete,
        }


def score(
    chosen: BenchmarkSet, questions: Sequence[Question], answers: Answers, ratio: float | None, allow_failures: bool
) -> Score:
    """Score one ratio.

    Args:
        chosen: the set, for its metric.
        questions: everything that was to be asked.
        answers: what came back; letters are extracted again from the texts.
        ratio: which requests to score.
        allow_failures: score the answered questions even where requests failed; else the figures are withheld.
    """
    name = ratio_name(ratio)
    outcomes: list[bool] = []
    by_group: dict[str, list[bool]] = {}
    failed: dict[str, str] = {}
    tokens: list[int] = []
    methods: set[str] = set()
    unanswered = missing = 0
    for question in questions:
        record = answers.records.get((name, question.id))
        if record is None:
            missing += 1
        elif record["status"] != "answered":
            failed[question.id] = str(record.get("error"))
        else:
            letter = extract_answer(record["text"], question.options)
            unanswered += letter is None
            outcomes.append(letter == question.answer)
            for group in question.groups:
                by_group.setdefault(group, []).append(outcomes[-1])
            if record.get("prompt_tokens") is not None:
                tokens.append(record["prompt_tokens"])
            if record.get("method") is not None:
                methods.add(record["method"])
    groups: dict[str, Accuracy] = {}
    headline = None
    if outcomes and (allow_failures or not (failed or missing)):
        order = [*(g for g in chosen.groups if g in by_group), *sorted(set(by_group) - set(chosen.groups))]
        groups = {group: Accuracy.of(by_group[group]) for group in order}
        headline = Accuracy.mean_of(list(groups.values())) if chosen.macro else Accuracy.of(outcomes)
    mean = statistics.fmean(tokens) if tokens else None
    return Score(ratio, headline, groups, len(outcomes), unanswered, failed, missing, mean, sorted(methods))
