"""Video-MME, MLVU and LVBench in the formats in which they are published, read into one kind of question."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.public.rows import FormatError, Row, read_rows

LETTERS = "ABCDEFGHIJ"
MAX_SHOWN = 20


@dataclass(frozen=True)
class Question:
    """One multiple-choice question about one video.

    Attributes:
        id: unique in its set.
        video: the video as the set names it, a relative path with or without an extension.
        folders: where the set's archives put that video, relative to the videos' root, tried in this order.
        text: the question without its options.
        options: their texts without letters; option i has the letter ``LETTERS[i]``.
        body: question and options exactly as the set writes them, where it does; else empty.
        answer: letter of the right option.
        groups: what the official metric breaks this question down by.
    """

    id: str
    video: str
    folders: tuple[str, ...]
    text: str
    options: tuple[str, ...]
    body: str
    answer: str
    groups: tuple[str, ...]


def digest(questions: list[Question]) -> str:
    """SHA-256 over every field of every question: two runs with the same digest asked the same things."""
    return hashlib.sha256(json.dumps([asdict(q) for q in questions], sort_keys=True).encode()).hexdigest()


def lettered(row: Row, field: str, lines: list[str]) -> tuple[str, ...]:
    """Texts of ``A. text`` or ``(A) text`` lines, whose letters must run from A without a gap."""
    texts: list[str] = []
    for line in lines:
        found = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*?)\s*$", line, re.DOTALL)
        expected = LETTERS[len(texts)] if len(texts) < len(LETTERS) else "no more options"
        if found is None or (found[1] or found[2]) != expected:
            raise row.error(field, f"has {line!r} where an option starting with {expected!r} should be")
        texts.append(found[3])
    if len(texts) < 2:
        raise row.error(field, f"must hold at least 2 options, got {len(texts)}")
    return tuple(texts)


DURATIONS = ("short", "medium", "long")


def _videomme(row: Row, _: Path) -> list[Question]:
    options = row.get("options")
    # The second release writes the options as one string with newlines.
    lines = [line for line in options.split("\n") if line.strip()] if isinstance(options, str) else row.texts("options")
    texts = lettered(row, "options", lines)
    return [
        Question(
            id=row.text("question_id"),
            video=row.video("videoID"),
            folders=("", "data"),
            text=row.text("question"),
            options=texts,
            body="\n".join([row.text("question"), *lines]),
            answer=row.choice("answer", tuple(LETTERS[: len(texts)])),
            groups=(row.choice("duration", DURATIONS),),
        )
    ]


MLVU_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
MLVU_GENERATIVE = ("sub_scene", "subPlot", "summary")


def _mlvu(row: Row, path: Path) -> list[Question]:
    task = row.text("question_type")
    if task in MLVU_GENERATIVE or path.stem.endswith(MLVU_GENERATIVE):
        return []  # G-Avg: free text, judged by another model
    if task == "findNeedle":
        task = "needle"
    if task not in MLVU_TASKS:
        raise row.error("question_type", f"must be one of {', '.join(MLVU_TASKS)} or findNeedle, got {task!r}")
    options = [text.strip() for text in row.texts("candidates")]
    if not 2 <= len(options) <= len(LETTERS):
        raise row.error("candidates", f"must hold 2 to {len(LETTERS)} options, got {len(options)}")
    answer = row.text("answer").strip()
    if answer not in options:
        raise row.error("answer", f"must be the text of one of the candidates {options}, got {answer!r}")
    right = len(options) - 1 - options[::-1].index(answer)  # of equal texts the last, as in the official script
    return [
        Question(
            id=f"{path.stem}/{row.where.rpartition(' ')[2]}",
            video=row.video("video"),
            folders=(path.stem, ""),
            text=row.text("question"),
            options=tuple(options),
            body="",
            answer=LETTERS[right],
            groups=(task,),
        )
    ]


LVBENCH_TYPES = (
    "key information retrieval",
    "event understanding",
    "summarization",
    "entity recognition",
    "reasoning",
    "temporal grounding",
)


def _lvbench(row: Row, _: Path) -> list[Question]:
    video, entries = row.video("key"), row.get("qa")
    if not isinstance(entries, list):
        raise row.error("qa", f"must be a list of questions, got {type(entries).__name__}")
    questions = []
    for i, entry in enumerate(entries):
        item = Row(f"{row.where}, qa[{i}]", entry)
        body = item.text("question")
        start = re.search(r"^\s*\(A\)", body, re.MULTILINE)
        if start is None:
            raise item.error("question", f"must hold its options as lines '(A) ...', got {body!r}")
        lines = re.split(r"\n(?=\s*\([A-J]\))", body[start.start() :].strip())
        options = lettered(item, "question", lines)
        types = item.texts("question_type")
        questions.append(
            Question(
                id=item.text("uid"),
                video=video,
                folders=("", "videos"),
                text=body[: start.start()].strip(),
                options=options,
                body=body,
                answer=item.choice("answer", tuple(LETTERS[: len(options)])),
                groups=tuple(dict.fromkeys(types)),
            )
        )
    return questions


@dataclass(frozen=True)
class BenchmarkSet:
    """A public set: how to read it and what its official metric is made of."""

    title: str
    parse: Callable[[Row, Path], list[Question]]
    file_pattern: str  # in a folder given instead of a file
    size: int  # questions in the published set
    headline: str
    macro: bool  # the headline is the unweighted mean of the groups' accuracies
    groups: tuple[str, ...]


SETS = {
    "videomme": BenchmarkSet("Video-MME (no subtitles)", _videomme, "*.parquet", 2700, "overall", False, DURATIONS),
    "mlvu": BenchmarkSet("MLVU dev, multiple choice", _mlvu, "*.json", 2175, "M-Avg", True, MLVU_TASKS),
    "lvbench": BenchmarkSet("LVBench", _lvbench, "*.meta.jsonl", 1549, "overall", False, LVBENCH_TYPES),
}


def read_questions(name: str, data: Path) -> list[Question]:
    """Every question of a set, in the order of its files.

    Args:
        name: a key of ``SETS``.
        data: one annotation file, or a folder with the set's files.

    Raises:
        FormatError: nothing to read, or malformed rows; all of them are named (the first 20 in full).
    """
    chosen = SETS[name]
    files = sorted(data.glob(chosen.file_pattern)) if data.is_dir() else [data]
    if not files:
        raise FormatError(f"{data}: no file that matches {chosen.file_pattern} in this folder")
    questions: list[Question] = []
    seen: dict[str, str] = {}
    problems: list[str] = []
    for path in files:
        for where, content in read_rows(path):
            try:
                found = chosen.parse(Row(where, content), path)
                for question in found:
                    if question.id in seen:
                        raise FormatError(f"{where}: question {question.id!r} was already in {seen[question.id]}")
                    seen[question.id] = where
            except FormatError as error:
                problems.append(str(error))
            else:
                questions += found
    if problems:
        more = f"\n... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise FormatError(f"{len(problems)} malformed row(s):\n" + "\n".join(problems[:MAX_SHOWN]) + more)
    if not questions:
        raise FormatError(f"{data}: no multiple-choice question in it")
    return questions


EXTENSIONS = ("", ".mp4", ".MP4", ".mkv", ".webm", ".mov", ".avi")


def find_video(root: Path, question: Question) -> Path | None:
    """The question's video below ``root``, as the published archives lay it out; None where it is absent."""
    for folder in question.folders:
        for extension in EXTENSIONS:
            path = root / folder / (question.video + extension)
            if path.is_file():
                return path
    return None
