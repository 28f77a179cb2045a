"""The score kernel against fp64: odd sizes, all dtypes, both load paths, strides, cancellation, tails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from score_vllm.kernels import ops, reference
from score_vllm.kernels.configs import ScoreConfig, main_tiles

# Small tiles, so that small inputs have several of them, whole and cut, and partly empty ones.
SMALL = ScoreConfig(block_m=16, block_h=128, block_k=16, num_warps=4, num_stages=2)
WARPGROUP = ScoreConfig(block_m=64, block_h=128, block_k=32, num_warps=4, num_stages=2)

# T, N, D, H
SHAPES = [
    (1, 1, 16, 64),
    (1, 7, 48, 64),
    (6, 1, 48, 128),
    (3, 22, 80, 256),
    (2, 33, 144, 512),
    (4, 9, 50, 100),
    (2, 19, 48, 1024),
]
# fp16 takes bf16's way: `make check` leaves it to `make test`.
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, form: str = "previous"):
    t, n, d, h = shape
    inputs = d if form == "none" else 2 * d
    x = torch.randn(t, n, d).to(dtype)
    w_in, b_in = torch.randn(h, inputs) / inputs**0.5, torch.randn(h) / 4
    if form == "residual":
        w_in[:, :d] /= 5
    w_out, b_out = torch.randn(h) / h**0.5, torch.randn(1)
    return x.to(device), [p.to(device) for p in (w_in, b_in, w_out, b_out)]


def exact(x: torch.Tensor, params: list[torch.Tensor], use_residual: bool = True) -> torch.Tensor:
    """The specification in fp64: the operands rounded to the dtype of x, nothing else."""
    weights = ops.pack_weights(*(p.cpu() for p in params), x.dtype, use_residual)
    x = x.cpu()
    operands = {"none": lambda x: x[..., :0], "previous": reference.previous, "residual": reference.residual}
    inputs = torch.cat([x, operands[weights.second](x)], -1).double()
    hidden = F.gelu(inputs @ weights.w_in.double().T + weights.b_in.double())
    return (hidden @ weights.w_out.double() + weights.b_out.double()).flatten()


def plain(x: torch.Tensor, params: list[torch.Tensor], use_residual: bool = True) -> torch.Tensor:
    """What one would write in torch, all in the dtype of x."""
    w_in, b_in, w_out, b_out = (p.to(x.dtype) for p in params)
    previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    inputs = torch.cat([x, x - previous], -1) if use_residual else x
    return (F.gelu(F.linear(inputs, w_in, b_in)) @ w_out + b_out).flatten()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all()
    return float((got.cpu().double() - want).abs().max())


def tolerance(dtype: torch.dtype, want: torch.Tensor, width: int) -> float:
    """Both products are exact and sums are fp32 in any dtype: a few roundings of the largest addends."""
    return 2e-6 * (1.0 + float(want.abs().max())) * max(1.0, width / 256) ** 0.5


@pytest.mark.parametrize("form", ["none", "previous", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score_is_near_fp64(shape, dtype, form, device, seed):
    x, params = make(shape, dtype, device, form)
    use_residual = form != "none"
    assert ops.pack_weights(*params, dtype, use_residual).second == form
    got = ops.score(x, *params, use_residual)
    assert ops.last_backend("score") == "triton"
    want = exact(x, params, use_residual)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert error(got, want) <= max(tolerance(dtype, want, shape[3]), 2 * error(plain(x, params, use_residual), want))
    # In 16 bits plain torch rounds the hidden activation, so twice its error proves little: hold the fp32 bound.
    assert error(got, want) <= tolerance(dtype, want, shape[3])


@pytest.mark.parametrize("form", ["previous", "residual"])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(("config", "n"), [(SMALL, 11), (WARPGROUP, 43)], ids=["small", "warpgroup"])
def test_whole_and_cut_tiles_agree_bit_for_bit(config, n, tma, form, device, seed):
    from score_vllm.kernels import score as kernel

    # Small whole numbers make every sum exact, so that any difference is one of indexing or of order.
    # Three token tiles, the last one nearly empty, by two tiles of the width.
    t, d, h = 3, 48, 256
    x = torch.randint(-3, 4, (t, n, d), device=device).to(torch.bfloat16)
    w_in = torch.randint(-1, 2, (h, 2 * d), device=device) / 8
    w_out = torch.randn(h, device=device)
    if form == "residual":
        w_in[:, d:] *= 4
    weights = ops.pack_weights(w_in, torch.zeros(h, device=device), w_out, torch.ones(1, device=device), x.dtype)
    assert weights.second == form
    config = replace(config, tma=tma)
    whole = kernel.score_partials(x, weights, replace(config, block_h=64), 1)
    assert error(whole.sum(0), exact(x, [w_in, weights.b_in, w_out, weights.b_out])) < 1e-4
    for num_sms, uncut in ((1, 3), (4, 2), (1000, 0)):
        assert main_tiles(t * n, h, config, num_sms) == uncut
        partials = kernel.score_partials(x, weights, config, num_sms)
        assert partials.shape == (h // 64, t * n)
        assert torch.equal(partials, whole)


def test_tokens_that_repeat_score_the_same_wherever_they_stand(device, seed):
    # A static video: every frame after the first must tie, or the tie rule means nothing.
    x, params = make((1, 13, 64, 256), torch.bfloat16, device)
    scores = ops.score(x.expand(12, -1, -1).contiguous(), *params).view(12, 13)
    if device.type == "cuda":
        assert torch.equal(scores[1:], scores[1].expand(11, -1))
    else:
        # The interpreter multiplies with numpy, and some of OpenBLAS's kernels round a row by where it stands.
        torch.testing.assert_close(scores[1:], scores[1].expand(11, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_survives_cancellation(dtype, device, seed):
    # Frames 250 times larger than what changes between them; the policy looks at the change alone.
    t, n, d, h = 3, 17, 64, 64
    still = torch.randn(1, n, d) * 250
    x = (still + torch.randn(t, n, d)).to(dtype).to(device)
    w_in = torch.randn(h, 2 * d) / d**0.5
    w_in[:, :d] = 0
    params = [p.to(device) for p in (w_in, torch.zeros(h), torch.randn(h), torch.zeros(1))]
    got, want = ops.score(x, *params)[n:], exact(x, params)[n:]
    assert error(got, want) <= 2e-6 * h * float(want.abs().max())


@pytest.mark.parametrize("view", ["frames", "tokens", "every_other", "columns", "expanded", "transposed", "shifted"])
def test_strided_tokens_are_read_in_place(view, device, seed, monkeypatch):
    base, params = make((7, 18, 64, 64), torch.bfloat16, device)
    views = {
        "frames": lambda: base[2:6],
        "tokens": lambda: base[:, 3:14],
        "every_other": lambda: base[:, ::2],
        "columns": lambda: torch.cat([base, base], -1)[..., 16:80],
        "expanded": lambda: base[:1].expand(5, -1, -1),
        "transposed": lambda: base.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        "shifted": lambda: torch.cat([base.flatten(), base.flatten()])[3 : 3 + base.numel()].view(base.shape),
    }
    x = views[view]()
    want = exact(x.contiguous(), params)
    weights = ops.pack_weights(*params, x.dtype)

    def refuse(*args, **kwargs):
        raise AssertionError("x was copied")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", refuse)
        patch.setattr(torch.Tensor, "clone", refuse)
        patch.setattr(torch.Tensor, "reshape", refuse)
        got = ops.select_rows(x, weights, 1).scores
    assert error(got, want) <= tolerance(x.dtype, want, 64)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("n", [1, 2])
def test_addresses_beyond_31_bits(n, device, seed):
    # 2 * 2^30 elements between the first and the last frame; only the touched pages exist.
    stride = 2**30
    storage = torch.empty(2 * stride + 4096, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((3, n, 48), (stride, 48, 1))
    x.copy_(torch.randn(3, n, 48))
    _, params = make((3, n, 48, 64), torch.bfloat16, device)
    kept = ops.select_rows(x, ops.pack_weights(*params, x.dtype), 3 * n)
    want = exact(x.contiguous(), params)
    assert error(kept.scores, want) <= tolerance(x.dtype, want, 64)
    assert torch.equal(kept.buffer, x.reshape(3 * n, 48))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_token_poisons_only_its_own_scores(value, device, seed):
    x, params = make((4, 6, 48, 64), torch.bfloat16, device)
    want = exact(x, params)
    x[1, 2, 5] = value
    scores = ops.score(x, *params)
    # Its own score, and that of the same patch a frame later, whose residual it enters.
    touched = torch.zeros(24, dtype=torch.bool)
    touched[[1 * 6 + 2, 2 * 6 + 2]] = True
    assert not scores.cpu()[touched].isfinite().any()
    assert error(scores.cpu()[~touched], want[~touched]) <= tolerance(x.dtype, want, 64)
