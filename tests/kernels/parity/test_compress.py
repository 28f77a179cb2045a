"""Gather and the whole compressor: rows, channels, position digits, and the counts given back."""

from __future__ import annotations

import pytest
import torch

from score_vllm import VideoGrid, positions
from score_vllm.kernels import ops, reference
from score_vllm.layout import grid_layout, interleaved_layout, sequential_layout

# fp16 takes bf16's way: `make check` leaves it to `make test`.
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32]


def parameters(d: int, h: int, device: torch.device) -> list[torch.Tensor]:
    given = torch.randn(h, 2 * d) / d**0.5, torch.randn(h), torch.randn(h), torch.randn(1)
    return [p.to(device) for p in given]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "t_factor"),
    [(VideoGrid(1, 1, 1), 2.0), (VideoGrid(7, 3, 5), 25.3), (VideoGrid(2, 1, 300), 99_000.0), (VideoGrid(5, 17, 1), 0)],
)
def test_gathered_digits_are_the_packed_positions(grid, t_factor, dtype, device, seed):
    x = torch.randn(grid.t, grid.tokens_per_frame, 48, device=device).to(dtype)
    kept = max(1, grid.num_tokens // 3)
    indices = torch.randperm(grid.num_tokens)[:kept].sort().values.to(device)
    layout = grid_layout(grid, t_factor)
    offsets, table = layout.vision_offsets(), ops.PositionTable.from_layout(layout)
    buffer = ops.gather(x, indices, table)
    assert ops.last_backend("gather") == "triton"
    assert torch.equal(buffer[:, :48], x.flatten(0, 1)[indices])
    packed = positions.pack_offsets(offsets, dtype).to(device)
    assert torch.equal(buffer[:, 48:], packed[indices])
    assert torch.equal(positions.unpack_offsets(buffer[:, 48:].cpu()), offsets[indices.cpu()])
    # The same digits given as channels of every token.
    assert torch.equal(ops.gather(x, indices, packed), buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1040])
@pytest.mark.parametrize("kind", ["text", "newlines"])
def test_structure_rows_stand_where_the_unpruned_span_has_them(kind, width, dtype, device, seed):
    grid = VideoGrid(5, 3, 4)
    lists = [[70_000, 3], [], [1], [2, 9, 300], [5]]
    layout = (
        interleaved_layout(grid, lists, lists[::-1])
        if kind == "text"
        else sequential_layout(grid, [[]] * 5, [[]] * 5, row_newlines=True)
    )
    table = ops.PositionTable.from_layout(layout)
    learned = None if kind == "text" else torch.randn(32, device=device)
    x = torch.randn(5, 12, width, device=device).to(dtype)
    for kept in (1, 7, 60):
        indices = torch.randperm(60)[:kept].sort().values.to(device)
        rows = torch.randn(kept, 32, device=device).to(dtype)
        for merged in (None, rows):
            buffer = ops.gather(x, indices, table, learned=learned, rows=merged)
            assert torch.equal(buffer, reference.gather(x, indices, table, learned, merged))
        # Written out: every row at its slot of the unpruned span.
        unpruned = torch.zeros(layout.structure_tokens + 60, width, device=device, dtype=dtype)
        if learned is not None:
            unpruned[torch.from_numpy(layout.slots), :32] = learned.to(dtype)
        vision = torch.from_numpy(layout.vision()[:, 0])
        unpruned[vision] = x.flatten(0, 1)
        stays = torch.cat([torch.from_numpy(layout.slots), vision[indices.cpu()]]).sort().values
        buffer = ops.gather(x, indices, table, learned=learned)
        assert torch.equal(buffer[:, :width], unpruned[stays])
        channels = positions.unpack_offsets(buffer[:, width:].cpu())
        assert torch.equal(channels[:, :3], torch.from_numpy(layout.unpruned_offsets())[stays])
        if kind == "text":
            ids = torch.zeros(len(unpruned), dtype=torch.int64)
            ids[torch.from_numpy(layout.slots)] = torch.from_numpy(layout.ids) + 1
            assert torch.equal(channels[:, 3], ids[stays])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_policy_reads_the_first_columns_only(dtype, device, seed):
    grid = VideoGrid(6, 5, 3)
    x = torch.randn(6, 15, 192, device=device).to(dtype)
    weights = ops.pack_weights(*parameters(48, 64, device), dtype)
    table = ops.PositionTable.from_layout(interleaved_layout(grid, [[1, 2]] * 6, [[3]] * 6))
    out = ops.select_rows(x, weights, 9, table, width=48)
    plain = ops.select_rows(x[..., :48].contiguous(), weights, 9)
    assert torch.equal(out.scores, plain.scores)
    assert torch.equal(out.indices, plain.indices)
    assert torch.equal(out.buffer, reference.gather(x, out.indices, table))


def test_tokens_kept_whatever_their_scores(device, seed):
    x = torch.randn(4, 35, 48, device=device)
    weights = ops.pack_weights(*parameters(48, 128, device), x.dtype)  # scores arrive in several addends
    plain = ops.select_rows(x, weights, 1).scores
    always = plain.argsort()[:9].sort().values.cpu()
    out = ops.select_rows(x, weights, 30, always=always)
    assert ops.last_backend("select_rows") == "triton"
    others = plain.cpu().index_fill(0, always, float("-inf")).topk(21).indices
    assert torch.equal(out.indices.cpu(), torch.cat([always, others]).sort().values)
    x[0, 0, 0] = float("nan")
    assert ops.select_rows(x, weights, 30, always=torch.tensor([0])).has_nan


@pytest.mark.parametrize("channels", [None, 1, 5, 16])
@pytest.mark.parametrize("d", [16, 48, 1040, 2064])
def test_gather_copies_rows_and_channels(d, channels, device, seed):
    x = torch.randn(6, 11, d, device=device)
    extra = None if channels is None else torch.randn(66, channels, device=device)
    for kept in (1, 4, 66):
        indices = torch.randperm(66, device=device)[:kept]
        assert torch.equal(ops.gather(x, indices, extra), reference.gather(x, indices, extra))
        assert torch.equal(ops.gather(x[::2, 1:], indices % 30), reference.gather(x[::2, 1:], indices % 30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16, 64), (4, 18, 48, 128), (1, 12, 80, 64), (9, 1, 48, 64), (3, 24, 64, 512)])
def test_compress_agrees_with_its_parts_and_the_reference(shape, dtype, device, seed):
    t, n, d, h = shape
    x = torch.randn(t, n, d, device=device).to(dtype)
    given = parameters(d, h, device)
    weights = ops.pack_weights(*given, dtype)
    table = ops.PositionTable.from_layout(grid_layout(VideoGrid(t, 1, n), 50.0))
    want = reference.score(x, *given)
    tolerance = 4e-6 * (1.0 + float(want.abs().max()))
    for k in sorted({1, max(1, t * n // 10), t * n}):
        out = ops.select_rows(x, weights, k, table)
        assert ops.last_backend("select_rows") == "triton"
        assert not out.has_nan
        assert float((out.scores - want).abs().max()) <= tolerance
        assert torch.equal(out.indices, reference.topk(out.scores, k)[0])
        assert torch.equal(out.buffer, reference.gather(x, out.indices, table))
        # Kept here or there: only tokens within the tolerance of the threshold may differ.
        threshold = want.sort().values[-k]
        clear = (want - threshold).abs() > 2 * tolerance
        kept = torch.zeros(t * n, dtype=torch.bool, device=device)
        kept[out.indices] = True
        assert torch.equal(kept[clear], (want > threshold)[clear])


def test_compress_reports_nan(device, seed):
    x = torch.randn(3, 10, 48, device=device).to(torch.bfloat16)
    weights = ops.pack_weights(*parameters(48, 64, device), torch.bfloat16)
    x[1, 4, 7] = float("nan")
    out = ops.select_rows(x, weights, 5)
    assert bool(out.has_nan)
    assert not {14, 24} & set(out.indices.tolist())


def test_warm_up_runs_every_kernel_once(device):
    ops.warm_up(ops.pack_weights(*parameters(48, 64, device), torch.bfloat16))
    assert ops.last_backend("select_rows") == "triton"
