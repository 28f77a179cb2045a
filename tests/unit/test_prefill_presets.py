"""The committed presets: the true models' sizes, the paper's prompt, and inputs as transformers would place them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.prefill import preset as presets
from benchmarks.prefill.prompt import build_prompt
from benchmarks.prefill.rows import CheckError
from benchmarks.prefill.transformers_engine import TransformersEngine, load_language_model


def test_the_papers_prompt() -> None:
    paper = presets.load_preset("paper")
    assert paper.visual_tokens == 42566
    assert paper.visual_tokens + paper.text_tokens == 42657
    assert paper.retained_tokens(None) == 42566
    # 42,560 and 6 tokens: floor of each, at least one.
    assert [paper.retained_tokens(r) for r in (0.4, 0.25, 0.1)] == [17024 + 2, 10640 + 1, 4256 + 1]
    assert (paper.dtype, paper.needs_gpu) == ("bfloat16", True)


def qwen3_5_parameters() -> int:
    """Of Qwen3.5-9B's text model and head, from the shapes: 8 layers of gated attention, 24 gated delta nets."""
    width, mlp, norms = 4096, 3 * 4096 * 12288, 2 * 4096
    attention = width * (2 * 16 * 256 + 2 * 4 * 256) + 16 * 256 * width + 2 * 256
    channels = 2 * 16 * 128 + 32 * 128
    # Convolution of 4 taps, and per value head a decay and a bias; a norm of one head's width.
    delta_net = width * (channels + 32 * 128 + 2 * 32) + 32 * 128 * width + 4 * channels + 2 * 32 + 128
    return 2 * 248320 * width + width + 32 * (mlp + norms) + 8 * attention + 24 * delta_net


# Language model with embeddings and head, as published for Qwen2.5-7B, Qwen3-8B and Qwen2-7B.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("paper", 7_615_616_512),
        ("qwen3-vl-8b", 8_190_735_360),
        ("qwen3.5-9b", qwen3_5_parameters()),
        ("llava-video-7b", 7_615_616_512),
    ],
)
def test_true_shapes(tmp_path: Path, name: str, parameters: int) -> None:
    prepared = presets.prepare(presets.load_preset(name), tmp_path)
    assert not list((tmp_path / "model").glob("*.safetensors"))
    text, head, shell = load_language_model(prepared, "meta", "sdpa")
    counted = sum(p.numel() for module in (text, head) for p in module.parameters())
    assert counted == parameters
    assert {p.dtype for p in text.parameters()} == {torch.bfloat16}
    prompt = build_prompt(prepared)
    assert len(prompt.input_ids) == prepared.total_tokens(None)
    assert [len(slots) for slots in prompt.slots] == [grid.num_tokens for grid in prepared.preset.videos]
    token = prepared.config.get("video_token_id", prepared.config.get("video_token_index"))
    assert int((prompt.input_ids == token).sum()) == prepared.preset.visual_tokens
    assert torch.equal(prompt.text_slots.sort().values, (prompt.token_types == 0).nonzero()[:, 0])
    if prepared.family == "llava_onevision":
        assert (prepared.preset.visual_tokens, prepared.total_tokens(None)) == (10_816, 11_648 + 91)
        return
    merge = prepared.config["vision_config"]["spatial_merge_size"]
    grids = [layout.grid for layout in prompt.layouts]
    positions, _ = shell.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=prompt.token_types[None],
        video_grid_thw=torch.tensor([[g.t, g.h * merge, g.w * merge] for g in grids]),
        second_per_grid_ts=torch.ones(2),
    )
    for layout, start, slots in zip(prompt.layouts, prompt.starts, prompt.slots, strict=True):
        own = positions[:, 0, start] + layout.vision_offsets()
        assert torch.equal(positions[:, 0, slots].T, own)


def test_tiny_fits_its_bounds() -> None:
    for name in ("tiny", "demo"):
        preset = presets.load_preset(name)
        assert not preset.needs_gpu
        assert set(preset.engines) == {"vllm", "transformers"}
    assert presets.load_preset("tiny").visual_tokens == 4096
    assert presets.load_preset("tiny", repeats=3).repeats == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "magic"}, "weights: Input should be 'demo'"),
        ({"dtype": "int8"}, "dtype: Input should be 'float32'"),
        ({"engines": ["tgi"]}, "engines.0: Input should be"),
        ({"engines": []}, "engines: Tuple should have at least 1 item"),
        ({"videos": []}, "videos: Tuple should have at least 1 item"),
        ({"videos": [[1, 0, 2]]}, "VideoGrid.h must be an integer >= 1"),
        ({"text_tokens": 2}, "text_tokens: Input should be greater than or equal to 8, got 2"),
        ({"repeats": 0}, "repeats: Input should be greater than or equal to 1, got 0"),
        ({"config": None}, "config goes with weights"),
        ({"color": "red"}, "color"),
    ],
)
def test_wrong_presets_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = json.loads((presets.PRESETS / "tiny.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=message):
        presets.load_preset(str(path))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*paper.*got 'large'"):
        presets.load_preset("large")
    real = presets.checkpoint_preset("org/Some-Model", presets.load_preset("paper"))
    assert (real.name, real.weights, real.visual_tokens) == ("Some-Model", "checkpoint", 42566)


def small(config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "vocab_size": 320}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    text |= {name: size for name, size in sizes.items() if name in text}
    if "mrope_section" in text["rope_parameters"]:
        text["rope_parameters"]["mrope_section"] = [2, 1, 1]
    return config


@pytest.mark.parametrize("name", ["qwen3.5-9b", "llava-video-7b"])
def test_every_family_s_inputs_are_gathers_of_the_whole_prompt(tmp_path: Path, name: str) -> None:
    """Small copies of the presets run through the benchmark's own checks."""
    raw = json.loads((presets.PRESETS / f"{name}.json").read_text())
    raw |= {"config": small(raw["config"]), "videos": [[4, 4, 6], [1, 2, 3]], "repeats": 1, "dtype": "float32"}
    (tmp_path / "small.json").write_text(json.dumps(raw))
    prepared = presets.prepare(presets.load_preset(str(tmp_path / "small.json")), tmp_path / "built")
    engine = TransformersEngine(prepared, "cpu")
    engine.check([0.4, 0.1], ["score", "evs", "fastvid"])
    assert set(engine.run(0.1, "score")) == {"compressor", "llm_forward", "total"}


def test_a_wrong_place_is_caught(tmp_path: Path) -> None:
    """The engine's own check fails where positions, rows or counts are wrong."""
    raw = json.loads((presets.PRESETS / "tiny.json").read_text())
    raw["config"]["text_config"] |= {"num_hidden_layers": 1, "intermediate_size": 64}
    raw |= {"videos": [[4, 4, 6], [1, 2, 3]], "repeats": 1}
    (tmp_path / "small.json").write_text(json.dumps(raw))
    prepared = presets.prepare(presets.load_preset(str(tmp_path / "small.json")), tmp_path / "built")
    engine = TransformersEngine(prepared, "cpu")
    engine.check([0.4, 0.1], ["score", "evs", "holitom"])
    select = engine.select

    def shifted(number: int, ratio: float, method: str) -> Any:
        indices, rows, positions = select(number, ratio, method)
        return indices, rows, positions + 1

    def other_rows(number: int, ratio: float, method: str) -> Any:
        indices, rows, positions = select(number, ratio, method)
        return indices, rows.flip(0), positions

    def fewer(number: int, ratio: float, method: str) -> Any:
        indices, rows, positions = select(number, ratio, method)
        return (indices[1:], rows[1:], positions[:, 1:]) if len(indices) > 1 else (indices, rows, positions)

    for broken, message in [
        (shifted, "original positions"),
        (other_rows, "rows differ from a gather"),
        (fewer, "tokens instead of"),
    ]:
        engine.select = broken
        with pytest.raises(CheckError, match=message):
            engine.check([0.4], ["score"])
