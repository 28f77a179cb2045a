"""What the pages say can be followed: links lead somewhere, the site builds, each block of code is run by a test.

Every fenced block of bash or Python stands below one comment:

* ``<!-- run -->``: it is run here, from the root of the repository;
* ``<!-- tested: tests/e2e/test_serve.py::test_readme_example -->``: that test runs it, or the same thing;
* ``<!-- not run: needs a GPU -->``: nothing runs it, and why.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from score_vllm.architectures import SUPPORTED
from tests.pages import BLOCK, FENCED, PAGES, ROOT

LINK = re.compile(r"(?<!\\)\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)|(?:src|srcset)=\"([^\"]+)\"")


def blocks() -> list[tuple[Path, re.Match[str]]]:
    return [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text())]


def label(value: object) -> str | None:
    if isinstance(value, re.Match):
        return f"line-{value.string.count(chr(10), 0, value.start()) + 1}"
    return value.name if isinstance(value, Path) else None


def slug(heading: str) -> str:
    """As GitHub and mkdocs make anchors, for the plain headings that we write."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    for target, anchor, source in LINK.findall(text):
        path = (page.parent / (target or source)) if target or source else page
        assert path.exists(), f"{page.name} links to {target or source}, which does not exist"
        if anchor:
            slugs = [slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(), re.M)]
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}; headings there: {slugs}"


@pytest.mark.parametrize(("page", "block"), blocks(), ids=label)
def test_every_block_says_who_runs_it(page: Path, block: re.Match[str]) -> None:
    mark = block["mark"] or ""
    if mark.startswith("tested: "):
        for where in mark.removeprefix("tested: ").split(", "):
            file, _, name = where.partition("::")
            assert re.search(rf"def {name}\(", (ROOT / file).read_text()), f"{where} does not exist"
    else:
        assert mark == "run" or re.fullmatch(r"not run: needs [a-z0-9 ,A-Z]+", mark), f"{mark!r} is no mark"


@pytest.mark.parametrize(("page", "block"), [b for b in blocks() if b[1]["mark"] == "run"], ids=label)
def test_run(page: Path, block: re.Match[str], tmp_path: Path) -> None:
    code = block["code"].replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    command = [sys.executable, "-c", code] if block["language"] == "python" else ["bash", "-euc", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "SCORE_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_serve_starts_the_demo() -> None:
    # Run by make itself, the test must not hand its flags on.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "-n", "serve", "PORT=8230"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    line = shlex.split(done.stdout.strip().splitlines()[-1])
    shown = ["--model", "demo", "--retention", "0.1", "--host", "127.0.0.1", "--port", "8230"]
    assert line == [".venv/bin/score-serve", *shown]


def test_the_table_of_models_is_the_registrys(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))
    assert script["main"](["--check"]) == 0, "run: make tables"
    assert script["grouped"](["a/b-3B-x", "a/b-7B-x", "c/d"]) == "`a/b-{3B,7B}-x`, `c/d`"
    assert all(f"`{entry.name}`" in script["table"]() for entry in SUPPORTED)


def test_the_table_of_versions_is_the_records() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "compatibility.py"))
    assert script["main"](["--check"]) == 0, "run: make tables"
    assert "| not tested |" in script["table"]()


def test_a_run_is_recorded_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "compatibility.py"))
    names, record = script["main"].__globals__, tmp_path / "record.json"
    run = {
        "vllm": "0.32.0", "transformers": "5.19.0", "torch": "2.13.0", "python": "3.11.7", "platform": "cpu",
        "date": "2026-01-01",
        "passed": dict.fromkeys(script["TIERS"], 5), "failed": {}, "skipped": {"e2e": 2},
    }  # fmt: skip
    last = tmp_path / "last_run.json"
    monkeypatch.setitem(names, "LAST_RUN", last)
    monkeypatch.setitem(names, "RECORD", record)
    old = [script["TestedRun"](**{**run, "python": "3.12.1"}), script["TestedRun"](**{**run, "date": "2025-01-01"})]
    monkeypatch.setitem(names, "tested_runs", lambda: old)
    with pytest.raises(SystemExit, match="run the tests first"):
        script["record"]()
    for wrong in ({"failed": {"unit": 1}}, {"passed": {"unit": 5}}):
        last.write_text(json.dumps(run | wrong))
        with pytest.raises(SystemExit, match="not complete"):
            script["record"]()
    last.write_text(json.dumps(run))
    script["record"]()
    assert [(one["python"], one["date"]) for one in json.loads(record.read_text())] == [
        ("3.11.7", "2026-01-01"),
        ("3.12.1", "2026-01-01"),
    ]


def test_the_first_page_leads_to_all_others() -> None:
    pages = re.findall(r"^  - [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| \[[^]]+\]\((\w+\.md)\)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert ["index.md", *listed] == pages


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """As ``make docs``: a broken link, anchor, API name or a page outside the menu is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "num_retained_tokens" in (tmp_path / "site" / "api.html").read_text()
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://", page.read_text()), "needs a network"
