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


# Language model with embeddings and head, as published for Qwen2.5-7B and Qwen3-8B.
@pytest.mark.parametrize(("name", "parameters"), [("paper", 7_615_616_512), ("qwen3-vl-8b", 8_190_735_360)])
def test_true_shapes(tmp_path: Path, name: str, parameters: int) -> None:
    prepared = presets.prepare(presets.load_preset(name), tmp_path)
    assert not list((tmp_path / "model").glob("*.safetensors"))
    text, head, shell = load_language_model(prepared, "meta", "sdpa")
    counted = sum(p.numel() for module in (text, head) for p in module.parameters())
    assert counted == parameters
    assert {p.dtype for p in text.parameters()} == {torch.bfloat16}
    prompt = build_prompt(prepared)
    assert len(prompt.input_ids) == prepared.total_tokens(None)
    assert [len(slots) for slots in prompt.slots] == [42560, 6]
    assert int((prompt.input_ids == prepared.config["video_token_id"]).sum()) == 42566
    assert torch.equal(prompt.text_slots.sort().values, (prompt.token_types == 0).nonzero()[:, 0])
    merge = prepared.config["vision_config"]["spatial_merge_size"]
    positions, _ = shell.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=prompt.token_types[None],
        video_grid_thw=torch.tensor([[g.t, g.h * merge, g.w * merge] for g in prompt.grids]),
        second_per_grid_ts=torch.ones(2),
    )
    first = positions[:, 0, prompt.slots[0]]
    # Rows and columns of a 19 x 35 cell, counted from the cell's base.
    cell = first[:, : 19 * 35] - first[:, :1]
    assert torch.equal(cell[1], torch.arange(19).repeat_interleave(35))
    assert torch.equal(cell[2], torch.arange(35).repeat(19))


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
