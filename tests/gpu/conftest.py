"""GPU tests skip without a GPU, and fail without one where SCORE_REQUIRE_GPU=1 promises it."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        if os.environ.get("SCORE_REQUIRE_GPU") == "1":
            pytest.fail("SCORE_REQUIRE_GPU=1, and torch sees no GPU")
        pytest.skip("no GPU")
    return torch.device("cuda")
