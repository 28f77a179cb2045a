"""What only a real GPU can show of the kernels. ``tests/kernels/parity`` runs there too, for the numbers.

At the paper's width (D = 3584, H = 512): accuracy at real sizes, ties across tile shapes, no host sync, CUDA graphs,
memory, more than one stream and device, and which backend the library's own entry points run.
"""

from __future__ import annotations

import random
import sys

import pytest
import torch

from score_vllm import RetentionPolicy, VideoGrid, select_tokens
from score_vllm.kernels import ops, reference, torch_blocked
from score_vllm.layout import grid_layout

pytestmark = pytest.mark.gpu

D, H = 3584, 512


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    sys.stdout.write(f"seed {value}\n")
    torch.manual_seed(value)
    return value


def policy_weights(device: torch.device, d: int = D, h: int = H, dtype: torch.dtype = torch.bfloat16):
    w_in = torch.randn(h, 2 * d, device=device) / (2 * d) ** 0.5
    vectors = torch.randn(h, device=device), torch.randn(h, device=device) / h**0.5, torch.randn(1, device=device)
    return ops.pack_weights(w_in, *vectors, dtype)


def exact(x: torch.Tensor, weights: ops.PolicyWeights) -> torch.Tensor:
    assert weights.second == "previous"
    out = []
    for t in range(x.shape[0]):
        state = torch.cat([x[t], x[t - 1] if t else torch.zeros_like(x[t])], -1).double()
        hidden = torch.nn.functional.gelu(state @ weights.w_in.double().T + weights.b_in.double())
        out.append(hidden @ weights.w_out.double() + weights.b_out.double())
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("h", [64, 128, 256, 512, 1024])
def test_every_width_at_the_paper_s_hidden_size(h, dtype, device):
    x = torch.randn(7, 391, D, device=device).to(dtype)
    weights = policy_weights(device, h=h, dtype=dtype)
    got = ops.select_rows(x, weights, 100).scores
    want = exact(x, weights)
    plain = torch_blocked.score(x, weights)
    error = (got.double() - want).abs().max()
    assert error <= max(2 * float((plain.double() - want).abs().max()), 1e-5)


def test_equal_tokens_tie_in_whole_and_cut_tiles(device):
    # 42,566 tokens of one repeated frame: tiles of both shapes see the same tokens.
    frame = torch.randn(1, 1183, D, device=device).to(torch.bfloat16)
    scores = ops.select_rows(frame.expand(36, -1, -1).contiguous(), policy_weights(device), 1).scores.view(36, 1183)
    assert torch.equal(scores[1:], scores[1].expand(35, -1))


@pytest.mark.parametrize("length", [1_000_003, 2_000_000])
@pytest.mark.parametrize("kind", ["normal", "equal", "few"])
def test_topk_of_two_million(length, kind, device):
    scores = {
        "normal": lambda: torch.randn(length, device=device),
        "equal": lambda: torch.ones(length, device=device),
        "few": lambda: torch.randint(0, 7, (length,), device=device).float(),
    }[kind]()
    for k in (1, 12_345, length // 10, length):
        indices, has_nan = ops.topk(scores, k)
        assert torch.equal(indices, reference.topk(scores, k)[0])
        assert not has_nan


def test_no_host_sync(device):
    grid = VideoGrid(9, 16, 20)
    x = torch.randn(grid.t, grid.tokens_per_frame, D, device=device).to(torch.bfloat16)
    weights = policy_weights(device)
    table = ops.PositionTable.from_layout(grid_layout(grid, 2.0))
    always = torch.arange(0, grid.num_tokens, 20)
    ops.select_rows(x, weights, 288, table, always=always)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ops.select_rows(x, weights, 288, table, always=always)
        ops.topk(out.scores, 17)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ops.last_backend("select_rows") == "triton"
    assert torch.equal(out.buffer, reference.gather(x, out.indices, table))
    assert torch.isin(always, out.indices.cpu()).all()


def test_cuda_graph_replays_on_new_tokens(device):
    grid = VideoGrid(12, 14, 18)
    shape = (grid.t, grid.tokens_per_frame, D)
    weights = policy_weights(device)
    table = ops.PositionTable.from_layout(grid_layout(grid, 2.0)).on(device)
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.select_rows(x, weights, 302, table)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = ops.select_rows(x, weights, 302, table)
    for _ in range(3):
        x.copy_(torch.randn(shape, device=device))
        # Poison what the last replay wrote.
        captured.buffer.fill_(float("nan"))
        captured.indices.fill_(-1)
        captured.scores.fill_(float("nan"))
        graph.replay()
        eager = ops.select_rows(x, weights, 302, table)
        for name in ("buffer", "indices", "scores", "has_nan"):
            assert torch.equal(getattr(captured, name), getattr(eager, name)), name
    x[3, 4, 5] = float("nan")
    graph.replay()
    assert captured.has_nan


def test_memory_beyond_outputs_is_under_a_twentieth_of_x(device):
    x = torch.randn(36, 1183, D, device=device, dtype=torch.bfloat16)
    weights = policy_weights(device)
    table = ops.PositionTable.from_layout(grid_layout(VideoGrid(36, 7, 169), 1.0)).on(device)
    ops.select_rows(x, weights, 4258, table)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.select_rows(x, weights, 4258, table)
    outputs = sum(tensor.nbytes for tensor in out)
    assert torch.cuda.max_memory_allocated() - before - outputs < 0.05 * x.nbytes


def test_more_than_31_bits_of_tokens(device):
    # 680 thousand tokens of D = 3584 are 2.4e9 elements; the last frame must score like a short video of its own.
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * 2**30:
        pytest.skip(f"needs 8 GiB of free GPU memory, {free / 2**30:.1f} are")
    x = torch.empty(575, 1183, D, device=device, dtype=torch.bfloat16).normal_()
    weights = policy_weights(device)
    out = ops.select_rows(x, weights, 1000)
    tail = ops.select_rows(x[-3:].clone(), weights, 1)
    assert torch.equal(out.scores.view(575, 1183)[-2:], tail.scores.view(3, 1183)[-2:])
    assert torch.equal(out.buffer, x.flatten(0, 1)[out.indices])


def test_the_library_s_door_runs_triton(device):
    policy = RetentionPolicy(D).to(device)
    x = torch.randn(5, 130, D, device=device).to(torch.bfloat16)
    kept = select_tokens(x, 0.1, policy=policy)
    assert (ops.last_backend("score"), ops.last_backend("topk"), ops.last_backend("gather")) == ("triton",) * 3
    assert torch.equal(kept.embeddings, x.flatten(0, 1)[kept.indices])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tokens_on_another_device_than_the_current_one():
    other = torch.device("cuda:1")
    x = torch.randn(3, 50, D, device=other).to(torch.bfloat16)
    with torch.cuda.device(0):
        out = ops.select_rows(x, policy_weights(other), 15)
    assert torch.equal(out.buffer, x.flatten(0, 1)[out.indices])
