"""The proof table of docs/videos.md is what is measured."""

from __future__ import annotations

from pathlib import Path

from tests.compare_loaders import ours, rows, vllms

PAGE = Path(__file__).parents[2] / "docs" / "videos.md"


def test_the_table_of_the_page() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    for row in rows([ours, vllms]):
        assert row[2] == "yes"
        assert row in [cells[:4] for cells in shown]
