"""The public sets' readers and prompts: true formats, and every kind of damage named by file, row and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.public_sets import lvbench_line, mlvu_row, videomme_rows, write_lvbench, write_mlvu, write_videomme

pytest.importorskip("pyarrow")
from benchmarks.public.formats import SETS, digest, find_video, read_questions
from benchmarks.public.prompts import prompt
from benchmarks.public.rows import FormatError

STEMS = ("one", "two", "three")


def test_videomme_parquet(tmp_path: Path) -> None:
    questions = read_questions(
        "videomme", write_videomme(tmp_path / "test-00000-of-00001.parquet", videomme_rows(STEMS))
    )
    assert [q.id for q in questions] == ["001-1", "002-1", "003-1"]
    assert [q.groups for q in questions] == [("short",), ("medium",), ("long",)]
    assert [(q.video, q.answer) for q in questions] == [("one", "A"), ("two", "B"), ("three", "C")]
    assert questions[0].options[1] == "Candles."
    assert read_questions("videomme", tmp_path) == questions, "a folder stands for the file in it"


def test_videomme_options_as_one_string(tmp_path: Path) -> None:
    """The second release's layout reads as the first's."""
    rows = videomme_rows(STEMS)
    first = tmp_path / "first.json"
    first.write_text(json.dumps(rows))
    second = tmp_path / "second.json"
    second.write_text(json.dumps([{**row, "options": "\n".join(row["options"])} for row in rows]))
    assert read_questions("videomme", first) == read_questions("videomme", second)


def test_mlvu_folder(tmp_path: Path) -> None:
    questions = read_questions("mlvu", write_mlvu(tmp_path / "json", [f"{s}.mp4" for s in STEMS]))
    assert [q.id for q in questions] == ["1_plotQA/1", "2_needle/1", "4_count/1"], "the generative task is left out"
    assert [q.groups for q in questions] == [("plotQA",), ("needle",), ("count",)]
    assert {q.answer for q in questions} == {"A"}


def test_mlvu_answer_text_becomes_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "1_plotQA.json"
    path.write_text(json.dumps([mlvu_row("v.mp4", "plotQA", answer) for answer in ("Red", "Blue")]))
    assert [q.answer for q in read_questions("mlvu", path)] == ["B", "D"]


def test_lvbench_lines(tmp_path: Path) -> None:
    questions = read_questions("lvbench", write_lvbench(tmp_path / "video_info.meta.jsonl", STEMS))
    assert questions[0].options == ("1636", "1366", "1363", "1633")
    assert questions[0].text == "What year appears in the opening caption of the video?"
    assert questions[1].groups == ("reasoning", "event understanding")
    assert {q.answer for q in questions} == {"D"}


SAMPLES = [("videomme", "videomme.json", 9), ("mlvu", "1_plotQA.json", 1), ("lvbench", "video_info.meta.jsonl", 1)]


@pytest.mark.parametrize(("name", "file", "count"), SAMPLES)
def test_shared_samples(name: str, file: str, count: int, shared_dir: Path) -> None:
    """Hand-made files in the true formats."""
    questions = read_questions(name, shared_dir / "samples" / file)
    assert len(questions) == count
    assert all(len(q.options) == 4 for q in questions)


def _set(field: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, field: value}


def _without(field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {k: v for k, v in row.items() if k != field}


DAMAGE = [
    ("videomme", _without("answer"), "field 'answer' is missing"),
    ("videomme", _set("answer", "E"), "field 'answer' must be one of A, B, C, D, got 'E'"),
    ("videomme", _set("answer", 3.5), "field 'answer' must be a non-empty string, got 3.5"),
    ("videomme", _set("duration", "tiny"), "field 'duration' must be one of short, medium, long, got 'tiny'"),
    ("videomme", _set("options", ["A. x", "C. y"]), "field 'options' has 'C. y' where an option starting with 'B'"),
    ("videomme", _set("options", ["A. x"]), "field 'options' must hold at least 2 options"),
    ("videomme", _set("options", []), "field 'options' must be a non-empty list"),
    ("videomme", _set("videoID", "../etc/passwd"), "field 'videoID' must be a relative path without '..'"),
    ("videomme", _set("videoID", "/etc/passwd"), "field 'videoID' must be a relative path without '..'"),
    ("videomme", lambda _: "text", "must be an object with fields, got str"),
    ("videomme", _set("question_id", "001-1"), "question '001-1' was already in"),
    ("mlvu", _set("answer", "Pink"), "field 'answer' must be the text of one of the candidates"),
    ("mlvu", _set("question_type", "dance"), "field 'question_type' must be one of plotQA"),
    ("mlvu", _without("candidates"), "field 'candidates' is missing"),
    ("mlvu", _set("candidates", ["Yellow"]), "field 'candidates' must hold 2 to 10 options, got 1"),
    ("mlvu", _set("candidates", ["Yellow", ""]), r"field 'candidates[1]' must be a non-empty string"),
    ("lvbench", _without("qa"), "field 'qa' is missing"),
    ("lvbench", _set("qa", {}), "field 'qa' must be a list of questions, got dict"),
    ("lvbench", _set("qa", [{"uid": "9"}]), "qa[0]: field 'question' is missing"),
    ("lvbench", _set("qa", [{"uid": "9", "question": "Why?"}]), "qa[0]: field 'question' must hold its options"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[f"{d[0]}-{d[2][:50]}" for d in DAMAGE])
def test_malformed_rows_are_named(name: str, damage: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    rows: list[Any] = {
        "videomme": videomme_rows(STEMS),
        "mlvu": [mlvu_row(f"{stem}.mp4", "plotQA") for stem in STEMS],
        "lvbench": [lvbench_line(stem, str(i), ["reasoning"]) for i, stem in enumerate(STEMS)],
    }[name]
    path = tmp_path / ("set.jsonl" if name == "lvbench" else "set.json")

    def write() -> None:
        path.write_text("\n".join(map(json.dumps, rows)) if name == "lvbench" else json.dumps(rows))

    write()
    assert len(read_questions(name, path)) == 3, "whole before the damage"
    rows[1] = damage(rows[1])
    write()
    with pytest.raises(FormatError) as caught:
        read_questions(name, path)
    assert f"{path}: {'line' if name == 'lvbench' else 'row'} 2" in str(caught.value)
    assert message in str(caught.value)


def test_all_malformed_rows_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([_without("answer")(row) for row in videomme_rows(STEMS)]))
    with pytest.raises(FormatError, match=r"3 malformed row\(s\)") as caught:
        read_questions("videomme", path)
    assert all(f"row {i}" in str(caught.value) for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("absent.json", None, "no such file"),
        ("set.json", b"[{", "not valid JSON"),
        ("set.json", b'{"a": 1}', "must hold one JSON array of rows, got dict"),
        ("set.json", b"[]", "no multiple-choice question"),
        ("set.json", b'["\xff"]', "not UTF-8 text"),
        ("set.jsonl", b'{"a": 1}\n{', "set.jsonl: line 2: not valid JSON"),
        ("set.parquet", b"PAR1 no parquet", "not a readable parquet file"),
        ("set.csv", b"a,b", "must end in .parquet, .json or .jsonl"),
        ("folder", None, "no file that matches *.parquet in this folder"),
    ],
)
def test_files_that_are_no_sets(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    elif file == "folder":
        path.mkdir()
    with pytest.raises(FormatError) as caught:
        read_questions("videomme", path)
    assert message in str(caught.value)


def test_videos_are_found_where_the_archives_put_them(tmp_path: Path) -> None:
    (videomme, *_) = read_questions("videomme", write_videomme(tmp_path / "a.parquet", videomme_rows(STEMS)))
    (mlvu, *_) = read_questions("mlvu", write_mlvu(tmp_path / "json", [f"{s}.mp4" for s in STEMS]))
    assert find_video(tmp_path, videomme) is None
    (tmp_path / "data").mkdir()
    (tmp_path / "1_plotQA").mkdir()
    for place in ("data/one.mkv", "1_plotQA/one.mp4"):
        (tmp_path / place).touch()
    assert find_video(tmp_path, videomme) == tmp_path / "data" / "one.mkv"
    assert find_video(tmp_path, mlvu) == tmp_path / "1_plotQA" / "one.mp4"


def test_digest_sees_every_change(tmp_path: Path) -> None:
    rows = videomme_rows(STEMS)
    first = digest(read_questions("videomme", write_videomme(tmp_path / "a.parquet", rows)))
    assert first == digest(read_questions("videomme", write_videomme(tmp_path / "b.parquet", rows)))
    rows[2]["answer"] = "D"
    assert first != digest(read_questions("videomme", write_videomme(tmp_path / "c.parquet", rows)))


def test_prompts_word_for_word(tmp_path: Path) -> None:
    (videomme, *_) = read_questions("videomme", write_videomme(tmp_path / "a.parquet", videomme_rows(STEMS)))
    asked = "How many things move in the video?\nA. Apples.\nB. Candles.\nC. Berries.\nD. All are of the same number.\n"
    start = "Select the best answer to the following multiple-choice question based on the video"
    rule = " Respond with only the letter (A, B, C, or D) of the correct option.\n"
    assert prompt("videomme", videomme, "official") == (None, f"{start}.{rule}{asked}The best answer is:")
    assert prompt("videomme", videomme, "lmms-eval")[1] == (
        f"{start} and the subtitles.{rule}{asked}\nAnswer with the option's letter from the given choices directly."
    )
    (mlvu, *_) = read_questions("mlvu", write_mlvu(tmp_path / "json", [f"{s}.mp4" for s in STEMS]))
    options = "(A) Yellow\n(B) Red\n(C) Green\n(D) Blue\n"
    system, user = prompt("mlvu", mlvu, "official")
    assert system is not None
    assert system.startswith("Carefully watch this video and pay attention to every detail.")
    question = "What color is the square?"
    assert user == f"Question: {question}\nOptions:\n{options}Only give the best option.\nBest Option: ("
    assert prompt("mlvu", mlvu, "lmms-eval") == (
        None, f"{question}\n{options}\nOnly give the best option.\nBest option: ("
    )  # fmt: skip
    (lvbench, *_) = read_questions("lvbench", write_lvbench(tmp_path / "x.jsonl", STEMS))
    assert prompt("lvbench", lvbench, "official")[1].endswith("(D) 1633\nAnswer the question with the option letter")
    with pytest.raises(ValueError, match="prompt must be one of official, lmms-eval"):
        prompt("mlvu", mlvu, "mine")


def test_published_sizes() -> None:
    assert {name: chosen.size for name, chosen in SETS.items()} == {"videomme": 2700, "mlvu": 2175, "lvbench": 1549}
