"""Compressed videos in vLLM's encoder graphs: its own manager in a real engine, with a replay that a CPU can do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.worker.encoder_cudagraph import BudgetGraphMetadata, EncoderCudaGraphManager

from .conftest import Engine, make_video
from .warm_cells import forget_answers

VIDEO, IMAGE = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
# Room for four cells a video; the videos here have 12 tokens a cell.
ITEMS, FRAMES, BUDGETS = 4, 16, [16, 64, 128]


class Replay:
    """In the place of a captured graph: what it would do with its buffers, but without their unused ends, which the
    CPU's attention refuses."""

    def __init__(self, model: Any, buffers: dict[str, torch.Tensor], output: torch.Tensor) -> None:
        self._model, self._buffers, self._output = model, buffers, output

    def replay(self) -> None:
        used = int(self._buffers["cu_seqlens"].max())
        per_token = {"window_index", "reverse_indices"}
        whole = {key for key in self._buffers if "seqlen" in key or "sequence" in key}
        inputs = {
            key: value if key in whole else value[: used // 4 if key in per_token else used]
            for key, value in self._buffers.items()
        }
        self._output.fill_(float("nan"))  # nothing of an earlier replay may be read
        self._output[: used // 4] = self._model.encoder_cudagraph_forward(inputs)


class Manager(EncoderCudaGraphManager):
    """vLLM's, except for the capture itself."""

    def _capture_budget_graph(self, token_budget: int, path: str = "default", axis_keys: Any = ()) -> None:
        sizes = token_budget, self.max_batch_size, self.max_frames_per_batch
        values = self.model.prepare_encoder_cudagraph_capture_inputs(
            *sizes, self.device, self.dtype, path, axis_keys
        ).values
        output = torch.empty_like(self.model.encoder_cudagraph_forward({**values}))
        graph: Any = Replay(self.model, values, output)
        self._get_graph_set(path)[token_budget] = BudgetGraphMetadata(*sizes, graph, values, output)


def runner_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@pytest.fixture
def graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """The engine's manager, as if no method that ranks by attention were served."""
    runner = runner_of(engine)
    monkeypatch.setattr(type(runner.model), "graphs_take_videos", True)
    compilation = runner.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "encoder_cudagraph_token_budgets", BUDGETS)
    monkeypatch.setattr(compilation, "encoder_cudagraph_max_vision_items_per_batch", ITEMS)
    monkeypatch.setattr(compilation, "encoder_cudagraph_max_frames_per_batch", FRAMES)
    manager = Manager(runner.vllm_config, runner.device, torch.float32, runner.model)
    with torch.inference_mode():
        manager.capture(graph_pool="a pool")
    monkeypatch.setattr(runner, "requires_sequential_video_encoding", False)
    monkeypatch.setattr(runner, "encoder_cudagraph_manager", manager)
    yield manager
    runner.model._graph_cells = 0


def ask(engine: Engine, videos: Any, ratio: float, images: list[Any] | None = None) -> list[int]:
    engine.clear()
    data = {"video": videos} | ({"image": images} if images else {})
    count = 1 if isinstance(videos, dict) else len(videos)
    request = {
        "prompt": IMAGE * len(images or []) + VIDEO * count + "What happens?",
        "multi_modal_data": data,
        "mm_processor_kwargs": {"retention_ratio": ratio},
    }
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    (output,) = engine.llm.generate([request], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_answers_with_graphs_are_those_without(
    engine: Engine, graphs: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, known in part, known, in a batch, beside an image, larger than a graph: encoded once, the same rows."""
    runner = runner_of(engine)
    cells = runner.model.compressor.cells
    counts: list[tuple[int, int]] = []
    monkeypatch.setattr(
        runner.model.compressor.stats, "count_cells", lambda encoded, reused, _: counts.append((encoded, reused))
    )
    frames, metadata = make_video(40, 84, 112, seed=12000)

    def video(first: int, stop: int) -> Any:
        count = stop - first
        return frames[first:stop], {**metadata, "total_num_frames": count, "frames_indices": list(range(count))}

    picture = np.random.default_rng(12001).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    # Each request, and the cells that are encoded and reused of each of its videos.
    asked: list[tuple[Any, ...]] = [
        ([video(0, 8)], 0.4, None, [(4, 0)]),
        ([video(4, 12)], 0.4, None, [(2, 2)]),
        ([video(0, 12)], 0.3, None, [(0, 6)]),
        ([video(2, 10), video(12, 20), video(30, 36)], 0.5, [picture], [(0, 4), (4, 0), (3, 0)]),
        ([video(20, 40)], 0.4, None, [(7, 3)]),  # seven cells are more than a graph takes
        ([video(0, 8), video(22, 30)], 1.0, None, [(0, 4), (0, 4)]),
    ]
    seen: dict[bool, list[Any]] = {True: [], False: []}
    for with_graphs in seen:
        monkeypatch.setattr(runner, "encoder_cudagraph_manager", graphs if with_graphs else None)
        cells.clear()
        forget_answers(engine.llm)
        for number, (*one, expected) in enumerate(asked):
            hits, misses = graphs.graph_hits, graphs.graph_misses
            tokens = ask(engine, *one)
            assert counts == expected
            counts.clear()
            replayed = with_graphs and number in (0, 1, 3)
            assert (graphs.graph_hits > hits) == replayed
            assert graphs.graph_misses > misses or number != 4 or not with_graphs
            seen[with_graphs].append((tokens, [x.clone() for x, *_ in engine.compressed]))
    for (tokens, rows), (others, eager) in zip(seen[True], seen[False], strict=True):
        assert tokens == others
        for one, other in zip(rows, eager, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_embeddings_pass_by_the_graphs(engine: Engine, graphs: Manager) -> None:
    x = torch.randn(4 * 12, runner_of(engine).model.compressor.hidden_size, generator=torch.manual_seed(5))
    video = {"video_embeds": x, "video_grid_thw": torch.tensor([[4, 6, 8]])}
    before = graphs.graph_hits
    ask(engine, video, 0.5)
    ((seen, _, _),) = engine.compressed
    assert torch.equal(seen, x)
    assert graphs.graph_hits == before


def test_where_videos_stay_out_of_the_graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner_of(engine).model
    assert model.compressor.needs_saliency
    assert model.get_encoder_cudagraph_config().modalities == ["image"]
    monkeypatch.setattr(type(model.compressor), "needs_saliency", False)
    assert model.get_encoder_cudagraph_config().modalities == ["image", "video"]
    monkeypatch.setattr(model, "use_data_parallel", True)
    assert model.get_encoder_cudagraph_config().modalities == ["image"]


def test_the_v1_runner_leaves_batches_to_the_graphs_where_there_are_any(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks by ``hasattr``."""
    model = runner_of(engine).model
    assert hasattr(model, "requires_sequential_video_encoding")
    monkeypatch.setattr(type(model.compressor), "needs_saliency", False)
    monkeypatch.setattr(model, "_graphs_wanted", True)
    assert not hasattr(model, "requires_sequential_video_encoding")
    monkeypatch.setattr(model, "use_data_parallel", True)
    assert hasattr(model, "requires_sequential_video_encoding")
