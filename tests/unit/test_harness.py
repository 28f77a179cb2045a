"""What every benchmark relies on: medians, rounds, and a schema that refuses what does not fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness


def test_median_and_spread() -> None:
    sample = harness.Sample((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (sample.median, sample.spread) == (3.0, 1.0)
    assert harness.Sample((5.0,)).spread == 0.0
    assert str(sample) == "3.0 ± 1.0"


def test_rounds_take_turns_and_drop_the_warm_up() -> None:
    seen: list[tuple[str, int]] = []

    def call(name: str) -> Callable[[int], int]:
        return lambda number: seen.append((name, number)) or number

    out = harness.rounds({"a": call("a"), "b": call("b")}, 2, warm_up=2)
    assert out == {"a": [0, 1], "b": [0, 1]}
    assert seen == [(name, number) for number in (-1, -2, 0, 1) for name in "ab"]
    with pytest.raises(ValueError, match="repeats must be >= 1"):
        harness.rounds({}, 0)


def test_results_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    harness.write_results(path, [{"ms": harness.Sample((1.0, 2.0)).to_json()}], benchmark="x")
    document = harness.read_results(path)
    assert (document["schema"], document["benchmark"]) == (1, "x")
    assert document["environment"]["machine"] == harness.machine_name()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"environment": {}}, "environment.machine must name the machine"),
        ({"rows": []}, "rows must be a non-empty list"),
        ({"rows": [3]}, "rows must be a non-empty list"),
        ({"rows": [{"x": float("nan")}]}, r"results.rows\[0\].x is nan"),
        ({"rows": [{"ms": {"median": 2.0, "spread": 0.0, "values": [1.0]}}]}, "ms.median is 2.0, its values give 1.0"),
        ({"rows": [{"ms": {"median": 1.0, "spread": 1.0, "values": [1.0]}}]}, "ms.spread is 1.0, its values give 0.0"),
        ({"rows": [{"ms": {"median": 1.0, "spread": 1.0, "values": []}}]}, "values is empty"),
    ],
)
def test_what_the_schema_refuses(change: dict[str, Any], message: str) -> None:
    good = {"schema": 1, "environment": {"machine": "m"}, "rows": [{"x": 1.5}]}
    assert harness.check_results(good) is good
    with pytest.raises(ValueError, match=message):
        harness.check_results({**good, **change})


def test_a_refused_result_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="rows"):
        harness.write_results(path, [])
    assert json.loads(path.read_text()) == {}
    with pytest.raises(ValueError, match=r"results\.json: environment"):
        harness.read_results(path)


def test_lists_on_the_command_line() -> None:
    assert harness.ratios("0.1, 0.4,0.1") == [0.4, 0.1]
    assert harness.integers("4,1,4") == [1, 4]
    for read, text in ((harness.ratios, "0"), (harness.ratios, "much"), (harness.ratios, "1.5"), (harness.ratios, ",")):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be numbers in \(0, 1\]"):
            read(text)
    for text in ("0", "-1", "1.5", "1,,2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer >= 1"):
            harness.integers(text)


def test_row_names() -> None:
    assert [harness.row_name(ratio) for ratio in (None, 1.0, 0.07, 0.125)] == [
        "vanilla",
        "SCORE 100%",
        "SCORE 7%",
        "SCORE 12.5%",
    ]


def test_quick_runs_stay_out_of_the_results() -> None:
    assert harness.default_output("load", "a/b") == harness.RESULTS / "load_b.json"
    assert harness.default_output("load", "a/b", True) == harness.RESULTS.parents[1] / "runs" / "load_b.json"
