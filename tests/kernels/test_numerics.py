"""The sum ``x A - previous B`` against fp64 with unrounded weights: which policies may use it, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from score_vllm import RetentionPolicy, demo
from score_vllm.kernels import inputs, ops, reference
from score_vllm.video import decode_video
from score_vllm.vision.tower import VisionTower

Parameters = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def policy(ratio: float, d: int = 512, h: int = 256) -> Parameters:
    """Random weights with |W2| = ratio * |W1|."""
    w_in = torch.randn(h, 2 * d) / (2 * d) ** 0.5
    w_in[:, d:] *= ratio * w_in[:, :d].norm() / w_in[:, d:].norm()
    return w_in / max(1.0, ratio), torch.randn(h) / 4, torch.randn(h) / h**0.5, torch.zeros(1)


def video(change: float, t: int = 16, n: int = 64, d: int = 512) -> torch.Tensor:
    """One frame of bf16 tokens plus noise of relative size ``change`` in every frame."""
    return (torch.randn(1, n, d) + change * torch.randn(t, n, d)).to(torch.bfloat16)


def exact(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """The paper's equations 2 to 4 in fp64: only the tokens are rounded."""
    w_in, b_in, w_out, b_out = (p.detach().double() for p in parameters)
    x = x.double()
    hidden = F.gelu(torch.cat([x, x - reference.previous(x)], -1) @ w_in.T + b_in)
    return (hidden @ w_out + b_out).flatten()


def quality(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Root mean square error over the logits' deviation, and the share of the top tenth that agrees."""
    k = want.numel() // 10
    same = set(ops.topk(got, k)[0].tolist()) & set(ops.topk(want.float(), k)[0].tolist())
    error = (got.double() - want).square().mean().sqrt() / want.std()
    return float(error), len(same) / k


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20260323)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.99])
def test_weights_that_read_the_previous_frame(ratio):
    assert ops.pack_weights(*policy(ratio), torch.bfloat16).second == "previous"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_that_ask_for_subtraction(dtype):
    w_in, *vectors = policy(2.01)
    packed = ops.pack_weights(w_in, *vectors, dtype)
    assert packed.second == "residual"
    assert torch.equal(packed.w_in, w_in.to(dtype))
    w_in[:, :512] = 0
    assert inputs.second_operand(w_in) == "residual"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_two_matrices_keep_what_a_still_token_meets(dtype):
    w_in = policy(1.5)[0]
    w_x, w_r = w_in.chunk(2, dim=1)
    a, b = inputs.shift_matrices(w_in, dtype)
    for matrix in (a, b):
        assert torch.equal(matrix.to(dtype).float(), matrix)
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((a - (w_x + w_r)).abs() <= half_ulp * (w_x + w_r).abs() * 1.01 + 1e-7).all()
    # A - B is W1 but for one rounding: that of A has cancelled.
    assert ((a.double() - b.double() - w_x.double()).abs() <= half_ulp * b.abs() * 1.01 + 1e-7).all()
    packed = ops.pack_weights(w_in, *policy(1.5)[1:], dtype)
    assert torch.equal(packed.w_in.float(), torch.cat([a, -b], dim=1))


def test_gradients_do_not_see_the_rounding():
    w_in = policy(1.0)[0].requires_grad_()
    x = video(0.01)
    upstream = torch.randn(x.shape[0], x.shape[1], 256)
    a, b = inputs.shift_matrices(w_in, torch.bfloat16)
    (x.float() @ a.T - reference.previous(x).float() @ b.T).backward(upstream)
    residual = x.double() - reference.previous(x).double()
    flat = upstream.flatten(0, 1).double()
    want = torch.cat([flat.T @ x.double().flatten(0, 1), flat.T @ residual.flatten(0, 1)], dim=1)
    assert w_in.grad is not None
    assert (w_in.grad - want).abs().max() <= 1e-4 * want.abs().max()


# Measured: docs/correctness.md has the figures.
@pytest.mark.parametrize("run", [reference.score, ops.score], ids=["reference", "blocked"])
@pytest.mark.parametrize("change", [1.0, 0.05, 0.0], ids=["moving", "nearly still", "still"])
@pytest.mark.parametrize("ratio", [1.0, 1.9, 20.0])
def test_bf16_agrees_with_fp64(ratio, change, run):
    x, parameters = video(change), policy(ratio)
    error, overlap = quality(run(x, *parameters), exact(x, parameters))
    assert error <= (0.004 if run is reference.score else 0.005)
    assert overlap >= 0.98


def test_the_criterion_is_needed(monkeypatch):
    # Where W2 is 20 times W1, reading the previous frame errs several times as much on nearly still video.
    x, parameters = video(0.01), policy(20.0)
    want = exact(x, parameters)
    subtracted = quality(reference.score(x, *parameters), want)[0]
    monkeypatch.setattr(reference, "second_operand", lambda w_in: "previous")
    assert quality(reference.score(x, *parameters), want)[0] > 2 * subtracted


def test_bf16_agrees_with_fp64_on_the_trained_demo_policy():
    model, saved = demo.ensure_demo()
    trained = RetentionPolicy.from_pretrained(saved)
    parameters = (trained.w_in, trained.b_in, trained.w_out, trained.b_out)
    x = VisionTower(model).encode(decode_video(demo.demo_clip().read_bytes()).frames)[0].to(torch.bfloat16)
    assert ops.pack_weights(*parameters, x.dtype).second == "previous"
    with torch.no_grad():
        error, overlap = quality(reference.score(x, *parameters), exact(x, parameters))
    assert error <= 0.001
    assert overlap == 1.0
