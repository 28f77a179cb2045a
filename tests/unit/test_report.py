"""README, results and pictures agree; and the check that says so can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("report")


@pytest.fixture
def copy(tmp_path: Path) -> list[str]:
    """Arguments that point the report at a copy of the pages and results."""
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path / "benchmarks.md")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    pages = [str(tmp_path / name) for name in ("README.md", "benchmarks.md")]
    return ["--pages", *pages, "--results", str(tmp_path / "results")]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def row(total: float) -> dict[str, Any]:
    times = {"median": total, "spread": 0.0, "values": [total]}
    tokens = {"visual_tokens": 5, "total_tokens": 9, "speedup": 2.0, "flop_bound": 3.0}
    name = {"engine": "vllm", "row": "SCORE 40%", "method": "score", "retention_ratio": 0.4, "in_tree": False}
    return {**name, **tokens, "compressor_ms": times, "llm_forward_ms": times, "total_ms": times}


def add_results(folder: Path, name: str, total: float = 7.25) -> Path:
    path = folder / f"prefill_latency_{name}.json"
    rows = [row(total), {**row(total), "row": "in-tree EVS 40%", "speedup": None, "not_run": "for a reason"}]
    document = {"schema": 1, "environment": {"machine": "a machine"}, "rows": rows}
    path.write_text(json.dumps(document))
    return path


def test_committed_files_agree(report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out + "\nrun: python benchmarks/report.py"


def test_a_changed_page_is_seen_and_restored(
    report: ModuleType, copy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    original = page.read_text()
    start = original.index("<!-- kernels -->")
    place = start + original[start:].index("x |")
    page.write_text(original[: place - 1] + "9" + original[place:])
    changed = page.read_text()
    assert changed != original
    assert report.main([*copy, "--check"]) == 1
    assert "--- benchmarks.md as it is" in capsys.readouterr().out
    assert page.read_text() == changed
    assert report.main(copy) == 0
    assert page.read_text() == original


@pytest.mark.parametrize("name", ["kernels_cpu.json", "methods_cpu.json"])
def test_changed_results_are_seen(report: ModuleType, copy: list[str], tmp_path: Path, name: str) -> None:
    def slower(document: dict[str, Any]) -> None:
        for row in document["rows"]:
            if row.get("implementation") == "torch":
                row["ms"] = {"median": 1e4, "spread": 0.0, "values": [1e4]}
            elif row.get("method") == "evs":
                row["ms"] = {"median": 1e6, "spread": 0.0, "values": [1e6]}

    edit(tmp_path / "results" / name, slower)
    assert report.main([*copy, "--check"]) == 1
    assert report.main(copy) == 0
    assert report.main([*copy, "--check"]) == 0


def test_new_results_fill_their_table_and_picture(report: ModuleType, copy: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "No GPU has run this yet" in (tmp_path / "benchmarks.md").read_text()
    path = add_results(tmp_path / "results", "paper")
    assert report.main([*copy, "--check"]) == 1
    assert report.main(copy) == 0
    text = (tmp_path / "benchmarks.md").read_text()
    assert "7.2 ± 0.0" in text
    assert "Not run here: vllm, in-tree EVS: for a reason." in text
    assert report.main([*copy, "--check"]) == 0
    # The same page, but a picture of other results.
    picture = path.with_suffix(".png")
    assert len(picture.read_bytes()) < 60_000
    add_results(tmp_path / "results", "paper", total=7.2500001)
    assert report.main([*copy, "--check"]) == 1
    assert report.main(copy) == 0
    picture.unlink()
    assert report.main([*copy, "--check"]) == 1


def test_without_results_a_block_says_so(report: ModuleType, tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "none"
    results.mkdir()
    readme.write_text("a\n<!-- kernels -->\nold\n<!-- /kernels -->\nb\n<!-- unknown -->\nkept\n<!-- /unknown -->\n")
    assert report.main(["--pages", str(readme), "--results", str(results)]) == 0
    want = "a\n<!-- kernels -->\n*Not measured yet.*\n<!-- /kernels -->\nb\n<!-- unknown -->\nkept\n<!-- /unknown -->\n"
    assert readme.read_text() == want


@pytest.mark.parametrize(
    "text",
    [
        "<!-- kernels -->\n",
        "<!-- /kernels -->\n",
        "<!-- kernels -->\n<!-- methods -->\n<!-- /methods -->\n<!-- /kernels -->\n",
        "<!-- kernels -->\n<!-- /kernels -->\n" * 2,
    ],
)
def test_broken_markers(report: ModuleType, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert report.main(["--pages", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 2
    assert "has no partner, is nested, or stands there twice" in capsys.readouterr().err


def test_results_without_a_place_or_of_no_use(
    report: ModuleType, copy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results" / "kernels_cpu.json"
    edit(results, lambda document: document["rows"][0]["ms"].update(median=1.0))
    assert report.main(copy) == 2
    assert "kernels_cpu.json: results.rows[0].ms.median is 1.0" in capsys.readouterr().err
    edit(results, lambda document: document.pop("rows"))
    assert report.main(copy) == 2
    results.write_text("{")
    assert report.main(copy) == 2
    shutil.copy(ROOT / "benchmarks" / "results" / "kernels_cpu.json", results)
    edit(results, lambda document: document.pop("arguments"))
    assert report.main(copy) == 2
    assert "block kernels: results lack what it shows" in capsys.readouterr().err
    page = tmp_path / "benchmarks.md"
    page.write_text(page.read_text().replace("<!-- kernels -->\n", "").replace("<!-- /kernels -->\n", ""))
    assert report.main(copy) == 2
    assert "no <!-- kernels --> ... <!-- /kernels --> on any page" in capsys.readouterr().err


def test_a_block_is_one_function(report: ModuleType, tmp_path: Path, benchmark_module: Callable) -> None:
    blocks = benchmark_module("report_blocks")
    (tmp_path / "load.json").write_text('{"rate": 3}')
    mine = {"load": blocks.Block("load", "load*.json", lambda results: f"{results['load.json']['rate']} a second")}
    page = tmp_path / "page.md"
    text = report.render({page: "<!-- load -->\n<!-- /load -->\n"}, tmp_path, mine)
    assert text == {page: "<!-- load -->\n3 a second\n<!-- /load -->\n"}
    with pytest.raises(ValueError, match="registered already"):
        blocks.block("kernels", "x.json")(lambda results: "")
