"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of test data that is not part of the repository: SCORE_SHARED, else ``../shared``; skips without it."""
    named = os.environ.get("SCORE_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared test data at {folder}; set SCORE_SHARED to its folder")
    return folder
