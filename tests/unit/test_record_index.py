"""Places of records in files, against the standard library's own readers."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from score_vllm.train.data import record_index, record_scan
from score_vllm.train.data.record_index import FileReader, data_files, in_split, is_held_out, open_index
from score_vllm.train.data.record_scan import parse_csv_row, scan_csv, scan_json_array, scan_lines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.booleans())
@in_tmp
def test_json_arrays(tmp_path: Path, chunk: int, values: list[Any], indent: int | None, ascii_only: bool) -> None:
    """Whatever the chunks, every element is found, and its bytes alone parse to it."""
    path = tmp_path / "a.json"
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    whole = json.loads(data.decode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_scan, "_CHUNK", chunk)
        found = list(scan_json_array(path))
    assert len(found) == len(whole)
    for (offset, length, element), value in zip(found, whole, strict=True):
        piece = data[offset : offset + length]
        assert json.loads(piece.decode("utf-8", "surrogatepass")) == value
        if "\\ud" not in json.dumps(value):  # lone surrogates are not UTF-8: their bytes stay true, not their text
            assert element == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "one JSON array"),
        (b'{"a": 1}', "one JSON array"),
        (b'[{"a": 1}, {"b"', "byte 11"),
        (b'[{"a": 1}', "not closed"),
        (b'[{"a": 1},', "not closed"),
        (b'[{"a": 1} {"b": 2}]', "',' or ']' expected at byte 10"),
        (b"[nonsense]", "damaged"),
    ],
)
def test_damaged_json_arrays_say_where(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        list(scan_json_array(path))


def test_an_element_without_end_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_scan, "MAX_RECORD_BYTES", 2000)
    monkeypatch.setattr(record_scan, "_CHUNK", 500)
    path = tmp_path / "a.json"
    path.write_text('["' + "x" * 100_000)
    with pytest.raises(ValueError, match="within 2000 bytes"):
        list(scan_json_array(path))
    path.write_text("x" * 100_000)
    with pytest.raises(ValueError, match="longer than 2000 bytes"):
        list(scan_lines(path))


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\r\0", codec="utf-8")), min_size=2), max_size=6))
@in_tmp
def test_csv_rows(tmp_path: Path, rows: list[list[str]]) -> None:
    path = tmp_path / "a.csv"
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows(rows)
    data = sink.getvalue().encode()
    path.write_bytes(data)
    found = list(scan_csv(path))
    assert [row for _, _, row in found] == rows
    assert [parse_csv_row(data[offset : offset + length]) for offset, length, _ in found] == rows


def test_csv_survives_bad_bytes_and_a_lost_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_scan, "MAX_FIELD_CHARS", 300)
    path = tmp_path / "a.csv"
    filler = b"".join(b"id%d,text\n" % i for i in range(100))
    path.write_bytes(b'\xef\xbb\xbfvideoID,caption\na,\xff\xfe\nb,"lost\n' + filler + b"last,row\n")
    rows = list(scan_csv(path))
    assert rows[0][2] == ["videoID", "caption"], "a byte-order mark is no part of the first name"
    assert rows[1][2] == ["a", "\ufffd\ufffd"]
    assert rows[2][2] is None
    assert rows[2][1] < 500, "what a lost quote can swallow is bounded"
    assert rows[-1][2] == ["last", "row"]
    assert csv.field_size_limit() == 131072, "the process's own limit is untouched"


def test_index_is_built_once_and_anew_for_other_content(tmp_path: Path) -> None:
    data, calls = tmp_path / "data.txt", []
    data.write_text("one")

    def scan() -> list[tuple[int, int, int]]:
        calls.append(1)
        return [(5, 6, 7), (1 << 40, 2, 3)]

    first = open_index(data, {"a": 1}, scan, tmp_path / "cache")
    again = open_index(data, {"a": 1}, scan, tmp_path / "cache")
    assert [again[i] for i in range(len(again))] == [(5, 6, 7), (1 << 40, 2, 3)]
    assert len(calls) == 1
    assert pickle.loads(pickle.dumps(first))[1] == (1 << 40, 2, 3), "a spawned worker opens the file itself"
    open_index(data, {"a": 2}, scan, tmp_path / "cache")
    data.write_text("two, longer")
    open_index(data, {"a": 1}, scan, tmp_path / "cache")
    assert len(calls) == 3


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "_FLUSH_ENTRIES", 1)
    data = tmp_path / "data.txt"
    data.write_text("one")

    def scan() -> Any:
        yield 1, 2, 3
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        open_index(data, {}, scan, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_file_reader_after_a_fork_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"0123456789")
    reader = FileReader(path)
    assert reader.read(2, 3) == b"234"
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(4, 2) == b"45" else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(OSError, match="ends before byte 12"):
        reader.read(8, 4)


def test_splits_are_by_name_and_of_the_size_asked_for() -> None:
    names = [f"video_{i}.mp4" for i in range(20_000)]
    share = sum(is_held_out(name, 0.1) for name in names) / len(names)
    assert 0.09 < share < 0.11
    assert not any(is_held_out(name, 0.0) for name in names)
    for name in names[:100]:
        assert in_split(name, "train", 0.1) != in_split(name, "held_out", 0.1)
        assert in_split(name, "all", 0.1)
        assert in_split(name, "", 0.1) == in_split(name, "train", 0.1)


def test_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "a(cauldron,llava)"
    folder.mkdir()
    for name in ("b.json", "a.json", "c.txt"):
        (folder / name).write_text("[]")
    assert [p.name for p in data_files(str(tmp_path), (".json",))] == ["a.json", "b.json"]
    assert [p.name for p in data_files(f"{tmp_path}/*/b*.json", (".json",))] == ["b.json"]
    assert [p.name for p in data_files(str(folder / "c.txt"), (".json",))] == ["c.txt"], "a file named is a file meant"
    for missing in ("no/such", str(tmp_path / "*.json")):
        with pytest.raises(FileNotFoundError, match="no file there"):
            data_files(missing, (".json",))
