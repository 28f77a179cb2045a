"""The blocked torch path (the CPU engine's) against fp64, and what it allocates."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from score_vllm.kernels import ops, reference, torch_blocked


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    sys.stdout.write(f"seed {value}\n")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["native", "upcast"])
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """16-bit products in 16 bits, or in fp32 as on a CPU without the instructions."""
    if request.param == "upcast":
        monkeypatch.setattr(torch_blocked, "_gemm_dtype", lambda x: torch.float32)
    return request.param


def case(t: int, n: int, d: int, h: int, dtype: torch.dtype, use_residual: bool = True) -> tuple[torch.Tensor, Any]:
    inputs = 2 * d if use_residual else d
    x = torch.randn(t, n, d).to(dtype)
    return x, (torch.randn(h, inputs) / inputs**0.5, torch.randn(h) / 4, torch.randn(h) / h**0.5, torch.randn(1))


def exact(x: torch.Tensor, params: Any, use_residual: bool = True) -> torch.Tensor:
    """The specification in fp64: the operands rounded to the dtype of x, nothing else."""
    weights = ops.pack_weights(*params, x.dtype, use_residual)
    operands = {"none": lambda x: x[..., :0], "previous": reference.previous, "residual": reference.residual}
    inputs = torch.cat([x, operands[weights.second](x)], -1).double()
    hidden = F.gelu(inputs @ weights.w_in.double().T + weights.b_in.double())
    return (hidden @ weights.w_out.double() + weights.b_out.double()).flatten()


def plain(x: torch.Tensor, params: Any, use_residual: bool = True) -> torch.Tensor:
    w_in, b_in, w_out, b_out = (p.to(x.dtype) for p in params)
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    inputs = torch.cat([x, x - previous], -1) if use_residual else x
    return (F.gelu(F.linear(inputs, w_in, b_in)) @ w_out + b_out).flatten()


@pytest.mark.parametrize("use_residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16, 64), (1, 700, 16, 64), (300, 1, 48, 100), (9, 137, 80, 128)], ids=str)
def test_score_errs_no_more_than_twice_plain_torch(shape, dtype, use_residual, gemm):
    x, params = case(*shape, dtype, use_residual)
    got = ops.score(x, *params, use_residual)
    assert ops.last_backend("score") == "torch"
    want = exact(x, params, use_residual)
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    error = (got.double() - want).abs().max()
    allowed = 2 * (plain(x, params, use_residual).double() - want).abs().max()
    # Where there are too few tokens for plain torch to err: one rounding of a hidden unit of size 4.
    floor = 4 * torch.finfo(dtype).eps if gemm == "native" else 1e-5
    assert error <= max(float(allowed), floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_tokens(dtype, gemm):
    base, params = case(8, 90, 64, 64, dtype)
    for x in (base[2:7], base[:, 5:60], base[:, ::3], base[:1].expand(6, -1, -1), base.transpose(0, 1)):
        want = exact(x.contiguous(), params)
        scores = ops.score(x, *params)
        assert (scores.double() - want).abs().max() <= 64 * torch.finfo(dtype).eps
        indices = torch.randperm(want.numel())[:50]
        assert torch.equal(ops.gather(x, indices), x.reshape(-1, 64)[indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("run", [ops.score, reference.score], ids=["ops", "reference"])
def test_tokens_that_repeat_score_the_same_wherever_they_stand(run, dtype):
    # A static video: every frame after the first must tie, or the tie rule means nothing.
    x, params = case(1, 33, 64, 100, dtype)
    scores = run(x.expand(120, -1, -1).contiguous(), *params).view(120, 33)
    assert torch.equal(scores[1:], scores[1].expand(119, -1))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in before or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors(item)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("t", "n"), [(64, 64), (16, 256), (2, 2048), (4096, 1)])
def test_score_needs_under_a_tenth_of_x(t, n, dtype):
    # Where the CPU has no bf16 product, blocks and weights are cast to fp32 and the smallest video is a larger one.
    cast = torch_blocked._gemm_dtype(torch.empty(0, dtype=dtype)) != dtype
    x, params = case(4 * t if cast else t, n, 512, 64, dtype)
    weights = ops.pack_weights(*params, dtype)
    with LiveBytes() as memory:
        torch_blocked.score(x, weights)
    assert memory.peak > 0
    assert memory.peak < 0.1 * x.nbytes
    with LiveBytes() as naive:
        plain(x, params)
    assert naive.peak > x.nbytes, "the count itself must see what the naive way allocates"
