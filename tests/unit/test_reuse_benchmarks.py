"""What the benchmarks of reused cells send, expect and report."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("psutil")
from benchmarks.clips import ClipShape
from benchmarks.report.serving import questions_rows, reuse_rows
from benchmarks.serving import questions, reuse
from benchmarks.serving.client import Counts, Request, read_requests, write_requests
from benchmarks.serving.reuse_clips import cells_of, cut, write_slides, write_source

SHAPE = ClipShape(32, 56, 84)


def test_cuts_and_windows_share_their_cells(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.mp4", SHAPE, seed=3)
    whole = cells_of(source, 128)
    assert len(set(whole)) == 16
    assert cells_of(cut(source, 0, 12), 128) == whole[:12]
    assert cells_of(cut(source, 4, 16), 128) == whole[4:], "the same pictures, not encoded again"
    assert cells_of(source, 128, (2, 14)) == whole[2:14]
    with pytest.raises(AssertionError, match="cannot be cut at 3 s"):
        cut(source, 3, 5)


def test_the_steps_of_a_repeat_are_expected_to_encode_what_is_new(tmp_path: Path) -> None:
    shape = ClipShape(20, 56, 84)
    steps = reuse.make_steps(tmp_path, shape, 7, 0.1, 0.25)
    expected = reuse.Expected(shape.frames)
    counts = {step.row: expected.count(step) for step in steps}
    slides = counts.pop("slide show")
    assert counts == {
        "vanilla": (10, 10),
        "cold, cache off": (10, 10),
        "cold": (10, 10),
        "another ratio": (0, 10),
        "asked again": (0, 10),
        "window slides": (2, 10),
        "window slides, files": (2, 10),
        None: (8, 8),
        "clip grows": (2, 10),
    }
    assert slides[1] == 10
    assert {step.server for step in steps} == set(reuse.SERVERS)


def test_a_slide_show_repeats_its_cells(tmp_path: Path) -> None:
    cells = cells_of(write_slides(tmp_path / "slides.mp4", SHAPE, 2, seed=1), 128)
    assert len(cells) == 16
    assert len(set(cells)) < 16


def test_a_wrong_number_of_cells_ends_the_benchmark() -> None:
    answer: Any = SimpleNamespace(score={"videos": [{"encoded_cells": 2, "reused_cells": 8}]})
    step = reuse.Step("cold", "cache on", Path("x.mp4"), 0.1)
    reuse.check_cells(step, answer, 2, 10)
    with pytest.raises(SystemExit, match="encoded 2 of 10 cells, not 0 of 10"):
        reuse.check_cells(step, answer, 0, 10)


def test_every_question_about_a_clip_has_another_ratio() -> None:
    args = argparse.Namespace(questions=4, ratios=[0.4, 0.25, 0.1, 0.05], max_tokens=4)
    setup: Any = SimpleNamespace(args=args, clips=[Path(f"/media/{i}.mp4") for i in range(8)])
    made = questions.make_requests(setup, Counts(100, 9))
    assert len(made) == 32
    for clip in setup.clips:
        asked = [(one.ratio, one.text) for one in made if one.url == clip.as_uri()]
        assert len(asked) == len({ratio for ratio, _ in asked}) == len({text for _, text in asked}) == 4


def test_windows_survive_the_requests_file(tmp_path: Path) -> None:
    made = [Request("u", "t", 1, 0.1, Counts(1, 2), (2.0, 4.0)), Request("u", "t", 1)]
    write_requests(tmp_path / "requests.json", made)
    assert read_requests(tmp_path / "requests.json") == made
    body = made[0].body("m")
    assert (body["video_start"], body["video_end"]) == (2.0, 4.0)
    assert "video_start" not in made[1].body("m")


def test_tables() -> None:
    def row(name: str, ttft: float, cells: list[list[int]]) -> dict[str, Any]:
        stages = {"ViT": {"median": ttft / 2}}
        return {"row": name, "ttft_ms": {"median": ttft}, "stages_ms": stages, "encoded_of_cells": cells}

    rows = [row("vanilla", 1000, [[10, 10]]), row("cold, cache off", 400, [[10, 10]]), row("cold", 100, [[1, 10]])]
    header, lines = reuse_rows({"rows": rows})
    assert len(header) == len(lines[0])
    assert lines[2] == ["cold", "1 of 10", "5.0", "10.00x", "4.00x"]
    runs = [
        {"row": name, "requests_per_second": rate, "encoded_cells": encoded, "reused_cells": 32 - encoded}
        for name, rate, encoded in (("cache off", 2.0, 32), ("cache on", 5.0, 8))
    ]
    assert questions_rows({"rows": runs})[1][1] == ["cache on", "2.50x", "8 of 32"]
