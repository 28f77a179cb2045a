"""Pages, results and pictures agree; and the check that says so can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import RESULTS
from benchmarks.report import Block, load_blocks
from benchmarks.report import __main__ as report


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with every block, written from a copy of the committed results."""
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n" + "".join(f"<!-- {name} -->\n<!-- /{name} -->\n\n" for name in load_blocks()))
    assert run(path) == 0
    return path


def run(page: Path, *more: str) -> int:
    return report.main(["--pages", str(page), "--results", str(page.parent / "results"), *more])


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


def test_committed_files_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out + "\nrun: python -m benchmarks.report"


def test_a_changed_page_is_seen_and_restored(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = page.read_text()
    start = original.index("<!-- kernels -->")
    place = start + original[start:].index("x |")
    page.write_text(original[: place - 1] + "9" + original[place:])
    changed = page.read_text()
    assert changed != original
    assert run(page, "--check") == 1
    assert "--- page.md as it is" in capsys.readouterr().out
    assert page.read_text() == changed
    assert run(page) == 0
    assert page.read_text() == original


@pytest.mark.parametrize("name", ["kernels_cpu.json", "methods_cpu.json"])
def test_changed_results_are_seen(page: Path, name: str) -> None:
    def slower(document: dict[str, Any]) -> None:
        for row in document["rows"]:
            if row.get("implementation") == "torch":
                row["ms"] = {"median": 1e4, "spread": 0.0, "values": [1e4]}
            elif row.get("method") == "evs":
                row["ms"] = {"median": 1e6, "spread": 0.0, "values": [1e6]}

    edit(page.parent / "results" / name, slower)
    assert run(page, "--check") == 1
    assert run(page) == 0
    assert run(page, "--check") == 0


def test_new_results_fill_their_table_and_picture(page: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "No GPU has run this yet" in page.read_text()
    path = add_results(page.parent / "results", "paper")
    assert run(page, "--check") == 1
    assert run(page) == 0
    assert "7.2 ± 0.0" in page.read_text()
    assert "Not run here: vllm, in-tree EVS: for a reason." in page.read_text()
    assert run(page, "--check") == 0
    # The same page, but a picture of other results.
    picture = path.with_suffix(".png")
    assert len(picture.read_bytes()) < 60_000
    add_results(page.parent / "results", "paper", total=7.2500001)
    assert run(page, "--check") == 1
    assert run(page) == 0
    picture.unlink()
    assert run(page, "--check") == 1


def test_without_results_a_block_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "results").mkdir()
    page.write_text("a\n<!-- kernels -->\nold\n<!-- /kernels -->\nb\n<!-- unknown -->\nkept\n<!-- /unknown -->\n")
    assert run(page) == 0
    text = page.read_text()
    assert text.startswith("a\n<!-- kernels -->\n*Not measured yet.*\n\nThe Triton kernels have not been timed")
    assert text.endswith("<!-- /kernels -->\nb\n<!-- unknown -->\nkept\n<!-- /unknown -->\n")


def test_every_block_has_words_for_no_results() -> None:
    for name, block in load_blocks().items():
        assert block.render({}).startswith("*Not measured yet.*"), name


def test_links_lead_out_of_docs(page: Path) -> None:
    """The same block on two pages: from the root, and from one folder below it."""
    folder = page.parent / "docs"
    folder.mkdir()
    (folder / "speed.md").write_text("<!-- methods -->\n<!-- /methods -->\n")
    both = ["--pages", str(page), str(folder / "speed.md"), "--results", str(page.parent / "results")]
    assert report.main(both) == 0
    assert "[methods_cpu.json](../benchmarks/results/methods_cpu.json)" in (folder / "speed.md").read_text()
    assert "[methods_cpu.json](benchmarks/results/methods_cpu.json)" in page.read_text()
    assert report.main([*both, "--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<!-- kernels -->\n",
        "<!-- /kernels -->\n",
        "<!-- kernels -->\n<!-- methods -->\n<!-- /methods -->\n<!-- /kernels -->\n",
        "<!-- kernels -->\n<!-- /kernels -->\n" * 2,
    ],
)
def test_broken_markers(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text(text)
    assert run(tmp_path / "page.md") == 2
    error = capsys.readouterr().err
    assert error.startswith("page.md: marker <!-- ")
    assert "has no partner, is nested, or stands there twice" in error


def test_results_without_a_place_or_of_no_use(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = page.parent / "results" / "kernels_cpu.json"
    edit(results, lambda document: document["rows"][0]["ms"].update(median=1.0))
    assert run(page) == 2
    assert "kernels_cpu.json: results.rows[0].ms.median is 1.0" in capsys.readouterr().err
    edit(results, lambda document: document.pop("rows"))
    assert run(page) == 2
    results.write_text("{")
    assert run(page) == 2
    shutil.copy(RESULTS / "kernels_cpu.json", results)
    edit(results, lambda document: document.pop("arguments"))
    assert run(page) == 2
    assert "block kernels: results lack what it shows" in capsys.readouterr().err
    shutil.copy(RESULTS / "kernels_cpu.json", results)
    page.write_text(page.read_text().replace("<!-- kernels -->\n", "").replace("<!-- /kernels -->\n", ""))
    assert run(page) == 2
    assert "no page has <!-- kernels -->" in capsys.readouterr().err


def test_a_block_is_a_few_lines(tmp_path: Path) -> None:
    block = Block(
        pattern="speed*.json",
        rows=lambda document: (["rate"], [[str(row["rate"])] for row in document["rows"]]),
        caption="on {environment[machine]}",
    )
    document = {"environment": {"machine": "a machine"}, "rows": [{"rate": 3}]}
    (tmp_path / "speed.json").write_text(json.dumps(document))
    written = report.render_blocks(tmp_path, {"speed": block})
    assert written["speed"] == (
        "| rate |\n|-----:|\n|    3 |\n\n(on a machine; [speed.json](benchmarks/results/speed.json))"
    )
