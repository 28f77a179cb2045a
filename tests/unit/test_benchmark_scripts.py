"""The folder of benchmarks: its README names every script, and no file is too long to read."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = sorted(path for path in BENCHMARKS.rglob("*.py") if "results" not in path.parts)
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text() and path.parent.name != "inserver"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_the_readme_names_every_script(path: Path) -> None:
    relative = path.relative_to(BENCHMARKS)
    module = ".".join(["benchmarks", *relative.with_suffix("").parts]).removesuffix(".__main__")
    command = f"python benchmarks/{relative}" if len(relative.parts) == 1 else f"python -m {module}"
    assert f"`{command}" in (BENCHMARKS / "README.md").read_text()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 12
