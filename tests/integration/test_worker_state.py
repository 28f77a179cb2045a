"""What the model keeps between steps: offsets used once, packed weights that sleep mode knows, saliency on demand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
from vllm import SamplingParams

from score_vllm.config import ServingConfig
from score_vllm.models.adapter import CompressionModelMixin, VideoCompressor
from score_vllm.positions import POSITION_CHANNELS, pack_offsets, unpack_offsets
from tests.integration.conftest import Engine, make_video

PROMPT = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


def model_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def ask(engine: Engine, seed: int, method: str = "score", **data: Any) -> Any:
    prompt = {
        "prompt": PROMPT,
        "multi_modal_data": {"video": [make_video(8, 112, 112, seed)]},
        "mm_processor_kwargs": {"retention_ratio": 0.4, "retention_method": method},
    }
    return engine.llm.generate([prompt], GREEDY, use_tqdm=False)


class LanguageModel(nn.Module):
    """Stands at the end of the mixin's calls."""

    def __init__(self) -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Any, multimodal_embeddings: Any = None, *, is_multimodal: Any = None) -> Any:
        return input_ids

    def forward(self, input_ids: Any, positions: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return positions


class Model(CompressionModelMixin, LanguageModel):
    """A model with the mixin and nothing else."""


def test_offsets_are_used_by_one_forward_only(engine: Engine) -> None:
    """vLLM's dummy runs call forward without having embedded anything."""
    model = Model()
    object.__setattr__(model, "compressor", VideoCompressor(ServingConfig(0.5, "uniform"), 16, "any"))
    model.register_buffer("_position_offsets", torch.zeros(8, 3, dtype=torch.int64), persistent=False)
    model._offset_rows = 0
    offsets = torch.tensor([[1, 2, 3], [300, 5, 6]])
    rows = torch.cat([torch.zeros(2, 16), pack_offsets(offsets, torch.float32)], dim=1)
    model.embed_input_ids(torch.zeros(4), [rows], is_multimodal=torch.tensor([False, True, True, False]))
    first = model(None, torch.zeros(3, 4, dtype=torch.int64))
    assert first.T.tolist() == [[0, 0, 0], [1, 2, 3], [300, 5, 6], [0, 0, 0]]
    assert not model(None, torch.zeros(3, 4, dtype=torch.int64)).any()


def test_no_offsets_are_left_over_in_the_engine(engine: Engine) -> None:
    ask(engine, 9100)
    model = model_of(engine)
    assert model._offset_rows == 0
    assert not model._position_offsets.any()


def test_unpacking_builds_no_tensor_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step on a GPU each would be a copy from the host."""
    offsets = torch.tensor([[0, 255, 256], [65535, 65536, 16777215]])
    channels = pack_offsets(offsets, torch.bfloat16)
    assert channels.shape == (2, POSITION_CHANNELS)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor was built from Python numbers"))
    assert torch.equal(unpack_offsets(channels), offsets)


def test_packed_weights_are_buffers_that_no_checkpoint_holds(engine: Engine) -> None:
    """vLLM's sleep at level 2 frees everything of the model, saves the buffers and copies them back in place."""
    model = model_of(engine)
    weights = model.compressor._weights
    buffers = dict(model.named_buffers())
    packed = {name.removeprefix("_policy_"): tensor for name, tensor in buffers.items() if name.startswith("_policy_")}
    tensors = {n: getattr(weights, n) for n in weights.__dataclass_fields__}
    tensors = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    learned = model.compressor.selector_weights.items()
    tensors |= {f"{method}_{name}": tensor for method, own in learned for name, tensor in own.named_tensors().items()}
    assert set(packed) == set(tensors) != set()
    assert all(packed[name] is tensor for name, tensor in tensors.items())
    assert not [name for name in model.state_dict() if "policy" in name or "offsets" in name]
    assert all(parameter.device.type == "cpu" for parameter in model.compressor.policy.parameters())


def test_sleep_and_wake_as_vllm_does_it(engine: Engine) -> None:
    """Buffers saved, memory overwritten, buffers copied back: the same answer, and the same policy."""
    model = model_of(engine)
    before, digest = ask(engine, 9200)[0].outputs[0].token_ids, model.compressor.policy.digest()
    saved = {name: buffer.cpu().clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        if name.startswith(("_policy_", "_position_")):
            buffer.fill_(float("nan") if buffer.is_floating_point() else 7)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(saved[name])
    engine.llm.reset_prefix_cache()
    engine.llm.llm_engine.reset_mm_cache()
    engine.llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
    nan_videos = model.compressor.stats.nan_videos
    assert ask(engine, 9200)[0].outputs[0].token_ids == before
    assert model.compressor.stats.nan_videos == nan_videos
    assert model.compressor.policy.digest() == digest


def test_attention_is_kept_only_for_methods_that_rank_by_it(engine: Engine) -> None:
    listener = model_of(engine)._saliency
    kept: list[Any] = []

    class Spy(type(listener)):  # type: ignore[misc]
        @property
        def _captured(self) -> Any:
            return self.__dict__.get("seen")

        @_captured.setter
        def _captured(self, value: Any) -> None:
            self.__dict__["seen"] = value
            if value is not None:
                kept.append(value)

    own = type(listener)
    listener.__dict__.pop("_captured", None)
    listener.__class__ = Spy
    try:
        engine.clear()
        ask(engine, 9300, "score")
        image = {"image": [torch.randint(0, 255, (3, 84, 84), dtype=torch.uint8).permute(1, 2, 0).numpy()]}
        prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>", "multi_modal_data": image}
        engine.llm.generate([prompt], GREEDY, use_tqdm=False)
        assert kept == []
        assert engine.saliency == [None]
        ask(engine, 9301, "fastvid")
        assert len(kept) == 1
        assert listener._captured is None, "queries and keys must not outlive the video"
    finally:
        listener.__class__ = own
        listener.__dict__.pop("seen", None)
        listener._captured = None


def test_the_profiling_run_is_forgotten_once(engine: Engine) -> None:
    """With several API servers the second one asks while the first may already have served."""
    from score_vllm.models.timing import _Video
    from score_vllm.models.worker import ScoreWorkerExtension

    class Worker(ScoreWorkerExtension):
        model_runner: Any

    worker = Worker()
    compressor = VideoCompressor(ServingConfig(0.5, "uniform"), 16, "any")
    worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(compressor=compressor))
    broken = _Video(selection=(0.0, 1.0), has_nan=torch.tensor(True))
    compressor.stats._record(broken)
    assert worker.score_status()["nan_videos"] == 0
    compressor.stats._record(broken)
    assert worker.score_status()["nan_videos"] == 1


def test_every_worker_refuses_by_itself() -> None:
    """vLLM hands on the answers of the first of several engines alone, and an error of any."""
    from score_vllm.models.worker import ScoreWorkerExtension

    class Worker(ScoreWorkerExtension):
        model_runner: Any

    def worker_with(compressor: Any) -> Worker:
        worker = Worker()
        worker.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(compressor=compressor))
        return worker

    good = worker_with(VideoCompressor(ServingConfig(0.5, "uniform"), 16, "any"))
    good.score_check("")
    with pytest.raises(RuntimeError, match="holds another policy than the API process"):
        good.score_check("digest")
    with pytest.raises(RuntimeError, match="without SCORE: the plug-in did not load there"):
        worker_with(None).score_check("")
