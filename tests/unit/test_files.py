"""Files appear whole, with the rights of any new file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from score_vllm.files import write_atomically
from score_vllm.train.annotate.log import write_lines


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, lambda part: part.write_text("one"))

    def fail(part: Path) -> None:
        assert part.suffix == ".txt"
        part.write_text("two")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, fail)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_rights_are_those_of_any_file_without_touching_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is the process's: two threads that set it aside at once would lose it."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
    (tmp_path / "any").touch()
    write_atomically(tmp_path / "a.txt", lambda part: part.write_text("one"))
    write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
