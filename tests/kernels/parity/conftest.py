"""One set of kernel tests for two machines: Triton's interpreter (TRITON_INTERPRET=1) and a real GPU.

In an ordinary run without a GPU they are not collected here but run by ``tests/kernels/test_interpreter.py``, in a
process of their own: the interpreter must be chosen before triton is imported.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Without a GPU these tests run only in test_interpreter.py's processes; where one was promised they must fail.
if not INTERPRETED and not torch.cuda.is_available() and os.environ.get("SCORE_REQUIRE_GPU") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)


def _correct_interpreter_bf16() -> None:
    """Triton 3.9's interpreter keeps bf16 as raw 16-bit integers: it truncates where a GPU rounds to nearest
    even, and multiplies the bit patterns. Give it a GPU's arithmetic, so that it tests our kernels instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def to_float(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return handle(to_float(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), target)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(to_float(operand.data), tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


if INTERPRETED:
    _correct_interpreter_bf16()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def seed() -> int:
    """Fresh every run; printed, so that a failure's report shows it. SCORE_TEST_SEED repeats one."""
    value = int(os.environ.get("SCORE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    sys.stdout.write(f"SCORE_TEST_SEED={value}\n")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    from score_vllm.kernels import ops

    with ops.force_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Every buffer the kernels allocate starts as NaN (or a huge negative index): an unwritten element shows."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)
