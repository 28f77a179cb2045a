"""Runs ``parity/`` under Triton's interpreter, which must be chosen before triton is imported: one process per file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PARITY = Path(__file__).parent / "parity"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted(path.name for path in PARITY.glob("test_*.py")))
def test_parity_under_the_interpreter(file, pytestconfig):
    """Those of its tests that this run's own ``-m`` takes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PARITY / file)]
    command += ["-m", pytestconfig.getoption("markexpr")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert re.search(r"\b[1-9]\d* passed", report), report
    assert "skipped" not in report, report
