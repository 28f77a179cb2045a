"""Engines under Ray give the tokens of one process; what is served, counted and lost there."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ray


def test_x(cluster):
    import pathlib
    import time

    pathlib.Path("/tmp/sc/env.json").write_text(__import__("json").dumps(cluster.env))
    time.sleep(100000)
