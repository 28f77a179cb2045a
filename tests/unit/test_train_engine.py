"""The frozen model: positions as served, batched cross-entropy equal to transformers run one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen import decoder
from score_vllm.train.frozen.model import EncodedSample, FrozenVLM


def a_sample(frames: int = 8, **changes: object) -> TrainingSample:
    pixels = np.random.default_rng(3).integers(0, 255, (frames, 112, 140, 3), dtype=np.uint8)
    fields = {"key": "a", "frames": pixels, "fps": 2.0, "prompt": "What moves?", "target": "A red square."}
    return TrainingSample(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> FrozenVLM:
    return FrozenVLM.from_pretrained(tiny_model, max_rollout_tokens=600)


@pytest.fixture(scope="module")
def encoded(engine: FrozenVLM) -> EncodedSample:
    return engine.encode(a_sample())


def subsets(total: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    some = [torch.randperm(total)[:k].sort().values for k in (1, 7, 30, 31, total // 2)]
    return [*some, torch.arange(total), torch.empty(0, dtype=torch.int64)]


def by_hand(engine: FrozenVLM, e: EncodedSample, kept: torch.Tensor) -> torch.Tensor:
    """Transformers' own whole model on one unpadded sequence; positions from their definition."""
    model = engine.model
    embed = model.get_input_embeddings()
    start = e.prefix.shape[0]
    offsets = e.layout.vision_offsets()
    text = torch.cat([e.suffix, e.target])
    after = start + int(offsets.max()) + 1 + torch.arange(text.shape[0])
    positions = torch.cat(
        [torch.arange(start).expand(3, -1), (start + offsets[kept]).T, after.expand(3, -1)], dim=1
    ).unsqueeze(1)
    rows = torch.cat([embed(e.prefix), e.x.flatten(0, 1)[kept], embed(text)]).unsqueeze(0)
    with torch.no_grad():
        logits = model(inputs_embeds=rows, position_ids=positions, use_cache=False).logits[0]
    answers = logits[-e.target.shape[0] - 1 : -1]
    return torch.nn.functional.cross_entropy(answers.float(), e.target)


def test_batched_equals_one_by_one(engine: FrozenVLM, encoded: EncodedSample) -> None:
    kept = subsets(encoded.num_tokens)
    wanted = torch.stack([by_hand(engine, encoded, k) for k in kept])
    assert wanted.std() > 1e-3, "the selections must matter"
    for budget in (1, 600, 1 << 20):
        engine.max_rollout_tokens = budget
        torch.testing.assert_close(engine.cross_entropy(encoded, kept), wanted, rtol=0, atol=1e-5)
    engine.max_rollout_tokens = 600


def test_logits_in_pieces_give_the_same(
    engine: FrozenVLM, encoded: EncodedSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = subsets(encoded.num_tokens)
    whole = engine.cross_entropy(encoded, kept)
    monkeypatch.setattr("score_vllm.train.frozen.model.LOGITS_AT_ONCE", 1000)
    torch.testing.assert_close(engine.cross_entropy(encoded, kept), whole, rtol=0, atol=1e-6)


def test_the_budget_bounds_what_runs_at_once(
    engine: FrozenVLM, encoded: EncodedSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    run = decoder.answer_states
    monkeypatch.setattr(
        "score_vllm.train.frozen.model.answer_states",
        lambda lm, e, *rest: (sizes.append(e.shape[:2]), run(lm, e, *rest))[1],
    )
    kept = [torch.arange(0, encoded.num_tokens, 4)] * 32
    engine.cross_entropy(encoded, kept)
    assert len(sizes) > 1
    assert all(b * n <= 600 for b, n in sizes)


def test_text_is_rendered_as_the_server_does(engine: FrozenVLM, encoded: EncodedSample) -> None:
    before, after = engine.render("What moves?")
    assert before.endswith("<|im_start|>user\n<|vision_start|>")
    assert after == "<|vision_end|>What moves?<|im_end|>\n<|im_start|>assistant\n"
    decode = engine.tokenizer.decode
    assert decode(encoded.prefix) == before
    assert decode(encoded.suffix) == after
    assert decode(encoded.target) == "A red square.<|im_end|>"


def test_time_and_grid(engine: FrozenVLM) -> None:
    encoded = engine.encode(a_sample(frames=6, fps=4.0))
    # 2 frames a cell at 4 frames a second is half a second; 2 positions a second.
    assert encoded.layout.cells[:, 1].tolist() == list(range(encoded.grid.t)), "one position a second"
    assert encoded.grid.t == 3
    assert encoded.x.shape == (3, encoded.grid.tokens_per_frame, engine.hidden_size)


def test_nothing_but_a_policy_could_have_gradients(engine: FrozenVLM, encoded: EncodedSample) -> None:
    assert not any(p.requires_grad for p in engine.model.parameters())
    ce = engine.cross_entropy(encoded, [torch.arange(4)])
    weight = torch.ones(1, requires_grad=True)
    (ce * weight).sum().backward()
    assert weight.grad is not None
    assert not encoded.x.requires_grad


@pytest.mark.parametrize("field", [{"prompt": "<|video_pad|>"}, {"target": "yes <|im_end|> no"}])
def test_text_with_special_tokens_is_a_broken_sample(engine: FrozenVLM, field: dict[str, str]) -> None:
    with pytest.raises(BrokenSampleError, match=r"^a: "):
        engine.encode(a_sample(**field))


@pytest.mark.parametrize("wrong", [[5, 3], [0, 0], [-1], [10**6]])
def test_wrong_selections_are_refused(engine: FrozenVLM, encoded: EncodedSample, wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        engine.cross_entropy(encoded, [torch.tensor(wrong)])


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such"):
        FrozenVLM.from_pretrained(tmp_path / "no_such")


def test_a_model_whose_attention_needs_masks_is_refused(engine: FrozenVLM) -> None:
    language_model = engine.model.model.language_model
    chosen = language_model.config._attn_implementation
    try:
        language_model.config._attn_implementation = "eager"
        with pytest.raises(ValueError, match="eager"):
            decoder.check_decoder(language_model)
    finally:
        language_model.config._attn_implementation = chosen
