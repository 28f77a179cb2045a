"""The operations' entry point: which backend runs, what is refused, positions, and top-K by properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from score_vllm import VideoGrid, positions
from score_vllm.kernels import configs, ops, reference
from score_vllm.layout import grid_layout


def parameters(d: int = 16, h: int = 64, use_residual: bool = True):
    return torch.randn(h, 2 * d if use_residual else d), torch.randn(h), torch.randn(h), torch.randn(1)


def weights(d: int = 16, h: int = 64, dtype: torch.dtype = torch.bfloat16, use_residual: bool = True):
    return ops.pack_weights(*parameters(d, h, use_residual), dtype, use_residual)


def test_the_cpu_runs_torch_and_says_so():
    x = torch.randn(4, 6, 16).to(torch.bfloat16)
    assert ops.backend_for(x) == "torch"
    ops.select_rows(x, weights(), 5)
    assert ops.last_backend("select_rows") == "torch"
    with ops.force_backend("triton"):
        assert ops.backend_for(x) == "triton"
        with ops.force_backend("torch"):
            assert ops.backend_for(x) == "torch"
        assert ops.backend_for(x) == "triton"
    assert ops.backend_for(x) == "torch"
    with pytest.raises(ValueError, match="backend must be one of"), ops.force_backend("cuda"):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compress_is_score_topk_gather(dtype):
    x = torch.randn(5, 12, 16).to(dtype)
    given = parameters()
    packed = ops.pack_weights(*given, dtype)
    table = ops.PositionTable.from_layout(grid_layout(VideoGrid(5, 3, 4), 300.0))
    out = ops.select_rows(x, packed, 7, table)
    assert torch.equal(out.scores, ops.score(x, *given))
    indices, has_nan = ops.topk(out.scores, 7)
    assert torch.equal(out.indices, indices)
    assert not out.has_nan
    assert not has_nan
    assert torch.equal(out.buffer, reference.gather(x, indices, table))
    assert out.buffer.is_contiguous()
    buffer, again = out[:2]
    assert buffer is out.buffer
    assert again is out.indices


def test_compress_without_residual_or_positions():
    x = torch.randn(3, 4, 16)
    packed = weights(dtype=torch.float32, use_residual=False)
    out = ops.select_rows(x, packed, 12)
    assert torch.equal(out.buffer, x.reshape(12, 16))
    want = reference.score(x, packed.w_in, packed.b_in, packed.w_out, packed.b_out, use_residual=False)
    assert torch.allclose(out.scores, want, atol=1e-5)


def test_some_tokens_are_kept_whatever_their_scores():
    x = torch.randn(5, 12, 16)
    packed = weights(dtype=torch.float32)
    plain = ops.select_rows(x, packed, 20).scores
    always = plain.argsort()[:6].sort().values
    out = ops.select_rows(x, packed, 20, always=always)
    others = plain.index_fill(0, always, float("-inf")).topk(14).indices
    assert torch.equal(out.indices, torch.cat([always, others]).sort().values)
    assert torch.equal(ops.select_rows(x, packed, 6, always=always).indices, always)
    x[0, 0, 0] = float("nan")
    assert ops.select_rows(x, packed, 20, always=torch.tensor([0])).has_nan


def test_nan_is_reported():
    x = torch.randn(3, 4, 16).to(torch.bfloat16)
    x[0, 0, 0] = float("nan")
    assert ops.select_rows(x, weights(), 3).has_nan


@settings(max_examples=200)
@given(
    grid=st.builds(VideoGrid, st.integers(1, 40), st.integers(1, 30), st.integers(1, 300)),
    t_factor=st.floats(0, 400_000, allow_nan=False),
    data=st.data(),
)
def test_position_digits_are_the_packed_offsets(grid, t_factor, data):
    layout = grid_layout(grid, t_factor)
    table = ops.PositionTable.from_layout(layout)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, grid.num_tokens - 1), min_size=1, max_size=20)))
    want = positions.pack_offsets(layout.vision_offsets()[indices], torch.bfloat16)
    assert torch.equal(reference.kept_channels(indices, table, torch.bfloat16), want)


NO_ROWS = torch.zeros(0, 5, dtype=torch.int64)
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-45, 0.1])


@settings(max_examples=300)
@given(values=st.lists(st.one_of(few_values, st.floats(width=32)), min_size=1, max_size=300), data=st.data())
def test_topk_is_a_stable_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    indices, has_nan = ops.topk(scores, k)
    ranked = np.nan_to_num(np.float32(values), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    assert indices.tolist() == sorted(np.argsort(-ranked, kind="stable")[:k].tolist())
    assert bool(has_nan) == bool(np.isnan(values).any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.select_rows(x[0], weights(), 1), r"x must be a non-empty \[T, N, D\]"),
        (lambda x: ops.select_rows(x[:0], weights(), 1), "non-empty"),
        (lambda x: ops.select_rows(x.double(), weights(), 1), "bf16, fp16 or fp32"),
        (lambda x: ops.select_rows(x.float(), weights(), 1), "packed as torch.bfloat16"),
        (lambda x: ops.select_rows(x, weights(d=32), 1), "the policy reads D=32"),
        (lambda x: ops.select_rows(x, weights(use_residual=False, d=32), 1), "the policy reads D=32"),
        (lambda x: ops.select_rows(x, weights(), 0), r"k must be in \[1, 6\]"),
        (lambda x: ops.select_rows(x, weights(), 7), r"k must be in \[1, 6\]"),
        (lambda x: ops.select_rows(x, weights(), 1, torch.zeros(5, 9)), r"channels must be \[T \* N = 6, C\]"),
        (
            lambda x: ops.select_rows(
                x, weights(), 1, ops.PositionTable.from_layout(grid_layout(VideoGrid(2, 2, 2), 1.0))
            ),
            "2 x 2 x 2 grid",
        ),
        (lambda x: ops.gather(x, torch.zeros(1, dtype=torch.int32)), r"indices must be \[K\] int64"),
        (lambda x: ops.topk(torch.zeros(3), 4), r"k must be in \[1, 3\]"),
        (lambda x: ops.topk(torch.zeros(3, dtype=torch.float64), 1), r"\[M\] float32"),
        (lambda x: ops.PositionTable(torch.zeros(3, 4), 1, 1, NO_ROWS), r"affine must be \[rows, 4\] int64"),
        (lambda x: ops.PositionTable(torch.zeros(3, 4).long(), 1, 1, NO_ROWS[:, 1:]), "structure must be"),
        (lambda x: ops.PositionTable(torch.zeros(3, 4).long(), 0, 1, NO_ROWS), "must be >= 1"),
        (lambda x: ops.gather(x, torch.arange(2), rows=x[0, :1]), r"rows must be \[K=2, D <= 16\]"),
        (lambda x: ops.gather(x, torch.arange(2), learned=torch.zeros(17)), r"learned must be \[D <= 16\]"),
        (lambda x: pack(w_in=torch.zeros(64, 31)), r"w_in must be \[H, 2D\]"),
        (lambda x: pack(b_in=torch.zeros(63)), r"b_in must be \[64\]"),
        (lambda x: pack(b_out=torch.zeros(())), r"b_out must be \[1\]"),
        (lambda x: pack(dtype=torch.float64), "dtype must be"),
        (lambda x: pack(w_out=torch.zeros(64, device="meta")), "w_out is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    x = torch.zeros(2, 3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        call(x)


def pack(**changed):
    given = {
        "w_in": torch.zeros(64, 32),
        "b_in": torch.zeros(64),
        "w_out": torch.zeros(64),
        "b_out": torch.zeros(1),
        "dtype": torch.bfloat16,
    }
    return ops.pack_weights(**(given | changed))


def test_padding_keeps_the_policy():
    x = torch.randn(3, 7, 16)
    packed = weights(h=100, dtype=torch.float32)
    wider = packed.padded(64)
    assert wider.width == 128
    assert wider.padded(64) is wider
    assert torch.allclose(ops.select_rows(x, packed, 1).scores, ops.select_rows(x, wider, 1).scores, atol=1e-5)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_every_chip_has_a_row(capability):
    name = configs.architecture(capability)
    assert {(name, 2), (name, 4)} <= set(configs.SCORE_CONFIGS)
    assert name == {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(capability, "other")
    with pytest.raises(ValueError, match="multiple of 64"):
        configs.score_config(name, 2, 100)


@settings(max_examples=300)
@given(rows=st.integers(1, 3_000_000), width=st.sampled_from([64, 128, 512, 1024]), num_sms=st.integers(1, 160))
def test_tiles_and_pieces_cover_every_token(rows, width, num_sms):
    config = configs.score_config("sm_90", 2, width)
    tiles = -(-rows // config.block_m)
    whole = configs.main_tiles(rows, width, config, num_sms)
    assert 0 <= whole <= tiles
    if config.block_h == configs.GROUP:
        assert whole == tiles
    # What is cut is less than one wave of whole tiles.
    assert (tiles - whole) * (width // config.block_h) < max(num_sms, width // config.block_h)


def test_the_paper_sized_video_on_132_multiprocessors():
    # 333 tiles x 2: five waves of 66 pairs, and 3 tiles that would hold the chip for a sixth.
    config = configs.score_config("sm_90", 2, 512)
    assert configs.main_tiles(42_566, 512, config, 132) == 330
