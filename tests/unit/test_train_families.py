"""Towers and the frozen model of every trainable family against transformers' own whole model."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from score_vllm import methods
from score_vllm.train.data.sample import TrainingSample
from score_vllm.train.frozen.captioner import describe
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.schema import ConfigurationError
from score_vllm.vision.tower import VisionTower
from tests.integration.family_oracle import Oracle, random_video
from tests.integration.tiny_families import HIDDEN, build_llava, build_qwen2_vl, build_qwen3
from tests.integration.tiny_glm_internvl import build_internvl

VIDEO = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
KINDS: dict[str, Any] = {
    "qwen3_vl": (partial(build_qwen3, kind="qwen3_vl"), "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": (partial(build_qwen3, kind="qwen3_vl_moe"), "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": (partial(build_qwen3, kind="qwen3_5"), "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": (partial(build_qwen3, kind="qwen3_5_moe"), "Qwen3_5MoeForConditionalGeneration"),
    "internvl": (build_internvl, "InternVLForConditionalGeneration"),
    "qwen2_vl": (build_qwen2_vl, "Qwen2VLForConditionalGeneration"),
    "llava_onevision": (build_llava, "LlavaOnevisionForConditionalGeneration"),
    "llava_video": (partial(build_llava, **VIDEO), "LlavaOnevisionForConditionalGeneration"),
}


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, FrozenVLM]:
    directory = tmp_path_factory.mktemp("tiny") / request.param
    build, model_class = KINDS[request.param]
    build(directory)
    return Oracle(directory, request.param, model_class), FrozenVLM.from_pretrained(directory, max_rollout_tokens=900)


def test_rollouts_equal_the_whole_model(family: tuple[Oracle, FrozenVLM]) -> None:
    """Cross-entropy of an answer under kept subsets, some of which leave whole cells empty."""
    oracle, engine = family
    frames, metadata = random_video(7, 97, 130, seed=5, fps=1.5)
    sample = TrainingSample(key="k", frames=frames, fps=1.5, prompt="What is it?", target="A thing, or two.")
    encoded = engine.encode(sample)
    assert encoded.x.shape[2] == HIDDEN
    before, after = engine.render(sample.prompt)
    text = before + oracle.processor.video_token + after + sample.target + "<|im_end|>"
    rows = encoded.x if encoded.levels is None else torch.cat([encoded.x, encoded.levels], dim=-1)
    seen = SimpleNamespace(compressed=[(rows.flatten(0, 1),)], images=[])
    unpruned = oracle.unpruned(text, [(frames, metadata)], [], seen)
    total = encoded.num_tokens
    assert int((unpruned.vision == 0).sum()) == total
    assert len(unpruned.vision) == encoded.num_text_tokens + total + 1
    torch.manual_seed(0)
    subsets = [torch.randperm(total)[:k].sort().values for k in (1, 2, total // 3, total)]
    subsets.append(torch.empty(0, dtype=torch.int64))
    wanted = []
    for kept in subsets:
        stays = unpruned.vision < 0
        stays[(unpruned.vision == 0).nonzero()[:, 0][kept]] = True
        visual = None if unpruned.visual is None else unpruned.visual[stays]
        levels = [level[stays] for level in unpruned.levels]
        states = oracle.states(unpruned.embeds[stays], unpruned.positions[:, stays], visual, levels)
        logits = oracle.model.lm_head(states[-len(encoded.target) - 1 : -1])
        wanted.append(torch.nn.functional.cross_entropy(logits, encoded.target).detach())
    assert torch.stack(wanted).std() > 1e-3, "the selections must matter"
    torch.testing.assert_close(engine.cross_entropy(encoded, subsets), torch.stack(wanted), atol=2e-5, rtol=0)


def test_descriptions_equal_the_whole_model_s(family: tuple[Oracle, FrozenVLM]) -> None:
    oracle, engine = family
    frames, metadata = random_video(6, 97, 130, seed=8, fps=1.5)
    encoded = engine.encode(TrainingSample(key="k", frames=frames, fps=1.5, prompt="What?", target="Nothing."))
    before, after = engine.render("What?")
    rows = encoded.x if encoded.levels is None else torch.cat([encoded.x, encoded.levels], dim=-1)
    seen = SimpleNamespace(compressed=[(rows.flatten(0, 1),)], images=[])
    text = before + oracle.processor.video_token + after
    unpruned = oracle.unpruned(text, [(frames, metadata)], [], seen)
    _, tokens, _ = oracle.greedy(unpruned, [torch.arange(encoded.num_tokens)], 3)
    # Descriptions hold no special token: up to the first they must agree.
    plain = list(takewhile(lambda token: token not in oracle.tokenizer.all_special_ids, tokens))
    assert plain
    assert describe(engine, encoded, len(plain)) == oracle.tokenizer.decode(plain).strip()


def test_tower_equals_the_model_s_own_features(family: tuple[Oracle, FrozenVLM]) -> None:
    oracle, engine = family
    frames, _ = random_video(6, 84, 112, seed=6)
    rows, grid = engine._tower.encode_rows(frames)
    processor = oracle.processor.video_processor
    options = {} if oracle.family.startswith(("llava", "internvl")) else {"do_sample_frames": False}
    inputs = processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt", **options)
    with torch.no_grad():
        if oracle.family == "internvl":
            own = oracle.model.model.get_image_features(inputs["pixel_values_videos"][0])
        else:
            own = oracle.model.model.get_video_features(**inputs)
    flat = rows.flatten(0, 1)
    if oracle.family == "llava_video":
        assert (grid.h, grid.w) == (4, 4), "transformers has no such pooling"
        return
    features = own.pooler_output
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features.reshape(-1, HIDDEN)
    torch.testing.assert_close(flat[:, :HIDDEN], features[: len(flat)], atol=1e-5, rtol=0)
    levels = getattr(own, "deepstack_features", ())
    assert flat.shape[1] == HIDDEN * (1 + len(levels))
    for level, other in zip(flat[:, HIDDEN:].split(HIDDEN, dim=1), levels, strict=bool(levels)):
        other = torch.cat(list(other)) if isinstance(other, list | tuple) else other
        torch.testing.assert_close(level, other, atol=1e-5, rtol=0)


def test_saliency_sums_to_one_per_frame(family: tuple[Oracle, FrozenVLM]) -> None:
    """Where no patch is left out or counted twice by pooling: LLaVA's 9 x 9 are."""
    _, engine = family
    frames, _ = random_video(4, 84, 112, seed=7)
    x, grid, by_kind = engine._tower.encode_with_saliency(frames)
    assert set(by_kind) == set(methods.SALIENCY_KINDS)
    for kind, saliency in by_kind.items():
        assert saliency.shape == (grid.t, grid.tokens_per_frame) == x.shape[:2]
        if engine._tower.kind != "llava_onevision":
            # "patch" is a mean over the patches of a token.
            share = (
                1 if kind == "frame" else 1 / getattr(engine._tower.config.vision_config, "spatial_merge_size", 2) ** 2
            )
            torch.testing.assert_close(saliency.sum(1), torch.full((grid.t,), float(share)))
        assert bool((saliency > 0).all())


def test_other_models_are_refused(tmp_path: Any) -> None:
    tf.Qwen2Config(num_hidden_layers=1, hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qwen2; supported"):
        VisionTower(tmp_path)
    with pytest.raises(ConfigurationError, match="training supports"):
        FrozenVLM.config_of(tmp_path)


def test_frames_are_checked(family: tuple[Oracle, FrozenVLM]) -> None:
    with pytest.raises(ValueError, match="frames must be non-empty"):
        family[1]._tower.encode(np.zeros((2, 8, 8), np.uint8))
