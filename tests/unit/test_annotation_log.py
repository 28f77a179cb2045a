"""The annotator's log: cut at any byte, held by one, never of another run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from score_vllm.train.annotate import log as annotation_log
from score_vllm.train.annotate.log import AnnotationLog, LogError, Outcome, write_lines

SETTINGS = {"model": "m", "ratio": None, "allow": ("a",)}


def outcome(i: int, status: str = "ok") -> Outcome:
    return Outcome(f"k{i}", status, f"/v/{i}.mp4", "What?", f"täxt\n{i}")


def test_cut_at_any_byte(tmp_path: Path) -> None:
    """Whatever a kill leaves, whole lines count, and the file can be appended to."""
    path = tmp_path / "a.log.jsonl"
    log = AnnotationLog(path, SETTINGS)
    for i in range(3):
        log.append(outcome(i))
    log.close()
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        log = AnnotationLog(path, SETTINGS)
        whole = sum(end <= cut for end in ends) - 1
        assert [log.status(f"k{i}") for i in range(3)] == ["ok"] * max(0, whole) + [""] * (3 - max(0, whole))
        log.append(outcome(7))
        assert log.outcome("k7") == outcome(7)
        log.close()
        again = AnnotationLog(path, SETTINGS)
        assert again.outcome("k7") == outcome(7)
        if whole > 0:
            assert again.outcome("k0") == outcome(0)
        again.close()
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_long_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "a.log.jsonl"
    AnnotationLog(path, SETTINGS).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    AnnotationLog(path, SETTINGS).close()
    assert path.read_bytes() == whole


def test_every_line_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        synced.append(os.fstat(handle).st_size)

    log = AnnotationLog(tmp_path / "a.log.jsonl", SETTINGS)
    monkeypatch.setattr(annotation_log.os, "fsync", fsync)
    for i in range(3):
        log.append(outcome(i))
        assert synced[-1] == log.path.stat().st_size
    assert len(synced) == 3


def test_the_last_outcome_counts(tmp_path: Path) -> None:
    log = AnnotationLog(tmp_path / "a.log.jsonl", SETTINGS)
    log.append(outcome(0, "failed"))
    log.append(outcome(0))
    assert log.status("k0") == "ok"
    log.close()
    assert AnnotationLog(tmp_path / "a.log.jsonl", SETTINGS).status("k0") == "ok"
    with pytest.raises(ValueError, match="status must be"):
        log.append(outcome(0, "good"))


def test_a_damaged_line_in_the_middle_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AnnotationLog(tmp_path / "a.log.jsonl", SETTINGS)
    for i in range(3):
        log.append(outcome(i))
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(data.replace(b'"key": "k1"', b'"key"; "k1"'))
    with caplog.at_level(logging.WARNING):
        again = AnnotationLog(log.path, SETTINGS)
    assert [again.status(f"k{i}") for i in range(3)] == ["ok", "", "ok"]
    assert again.outcome("k2") == outcome(2)
    assert "is damaged and not used" in caplog.text


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b'{"video": "a.mp4", "caption": "x"}\n', "not an annotator's file"),
        (b"7\n", "not an annotator's file"),
        (b'{"format": 99, "settings": {}}\n', "format 99"),
        (b'{"format": 1, "settings": {"model": "n", "allow": ["a"]}}\n', "model was 'n', is 'm'"),
    ],
)
def test_files_of_others_are_left_alone(first: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.log.jsonl"
    path.write_bytes(first)
    with pytest.raises(LogError, match=message):
        AnnotationLog(path, SETTINGS)
    assert path.read_bytes() == first


def test_one_at_a_time(tmp_path: Path) -> None:
    log = AnnotationLog(tmp_path / "a.log.jsonl", SETTINGS)
    with pytest.raises(LogError, match="in use"):
        AnnotationLog(log.path, SETTINGS)
    log.close()
    AnnotationLog(log.path, SETTINGS).close()


def test_write_lines_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write_lines(path, ({"a": "ü"} for _ in range(2))) == 2
    assert path.read_text() == '{"a": "ü"}\n{"a": "ü"}\n'

    def rows() -> Any:
        yield {"a": 1}
        raise RuntimeError("half-way")

    def refuse(written: Path) -> None:
        assert written.read_text() == '{"b": 1}\n'
        raise RuntimeError("checked")

    with pytest.raises(RuntimeError, match="half-way"):
        write_lines(path, rows())
    with pytest.raises(RuntimeError, match="checked"):
        write_lines(path, [{"b": 1}], refuse)
    assert path.read_text() == '{"a": "ü"}\n{"a": "ü"}\n'
    assert list(tmp_path.iterdir()) == [path]
