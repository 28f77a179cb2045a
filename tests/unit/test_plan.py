"""score-plan's arithmetic, worked out by hand where it can be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from score_vllm.architectures import SHORT_NAMES
from score_vllm.catalog import UsageError
from score_vllm.plan import GIB, ModelShape, Plan, read_config
from score_vllm.plan_cli import main, report

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = json.loads((ROOT / "score_vllm" / "assets" / "model_configs.json").read_text())["models"]


@pytest.fixture(scope="module")
def seven() -> ModelShape:
    return ModelShape.from_model("Qwen2.5-VL-7B")


def plan(shape: ModelShape, **changes: Any) -> Plan:
    return replace(Plan(shape=shape, frames=128, tokens=768, memory=73.6 * GIB, cell_cache=3.2 * GIB), **changes)


# As the hub counts the published checkpoints.
@pytest.mark.parametrize(
    ("model", "parameters"),
    {
        "Qwen2.5-VL-3B": 3_754_622_976,
        "Qwen2.5-VL-7B": 8_292_166_656,
        "Qwen2.5-VL-72B": 73_410_777_344,
        "Qwen2-VL-7B": 8_291_375_616,
        "Qwen3-VL-8B": 8_767_123_696,
        "Qwen3-VL-30B-A3B": 31_070_754_032,
        "LLaVA-OneVision-7B": 8_030_348_832,
    }.items(),
)
def test_parameters(model: str, parameters: int) -> None:
    assert ModelShape.from_model(model).parameters == parameters


def test_built_in_numbers_are_those_of_the_benchmarks() -> None:
    assert set(BUILT_IN) <= set(SHORT_NAMES)
    for model, preset in (("Qwen2.5-VL-7B", "paper"), ("Qwen3-VL-8B", "qwen3-vl-8b")):
        known = json.loads((ROOT / "benchmarks" / "prefill" / "presets" / f"{preset}.json").read_text())["config"]
        assert read_config(SHORT_NAMES[model]) == BUILT_IN[model]
        for part in ("text_config", "vision_config"):
            for name, value in BUILT_IN[model][part].items():
                assert known[part].get(name, value) == value, name


def test_qwen2_5_vl_7b_by_hand(seven: ModelShape) -> None:
    """The numbers of docs/operations.md."""
    made = plan(seven)
    assert made.layout.grid.num_tokens == 64 * 768 == 49152
    # 28 layers, keys and values of 4 heads of 128, 2 bytes.
    assert made.kv_bytes == 28 * 2 * 4 * 128 * 2 == 56 * 1024
    patches = 4 * 49152
    assert made.parts == {
        "weights": 2 * 8_292_166_656,
        "vision tower": 2 * patches * (3 * 14 * 14 * 2 + 2 * 1280 + 3 * 3420),
        "encoder cache": 2 * 49152 * (3584 + 9),
        "cell cache": 3.2 * GIB,
        "reserve": 2 * GIB,
    }
    free = 73.6 * GIB - sum(made.parts.values())
    assert made.blocks == int(free / (56 * 1024 * 16))
    # 4,915 kept and 512 of text: 340 blocks of 16 a video.
    assert made.prompt_tokens(0.1) == 4915 + 512
    assert made.concurrent(0.1) == made.blocks // 340
    assert made.prompt_tokens(1.0) == 49152 + 512
    assert made.concurrent(1.0) == made.blocks // 3104


def test_families(seven: ModelShape) -> None:
    qwen3 = plan(ModelShape.from_model("Qwen3-VL-8B"), frames=8)
    # Cells at 0.5, 1.5, 2.5, 3.5 s: "<", "0", ".", "5", " seconds", ">" and two markers.
    assert qwen3.layout.structure_tokens == 4 * 8
    assert qwen3.shape.row_values == 4096 * 4 + 12
    assert qwen3.kv_bytes == 36 * 2 * 8 * 128 * 2
    assert plan(ModelShape.from_model("Qwen3-VL-8B"), frames=400).layout.structure_tokens == 10 * 8 + 90 * 9 + 100 * 10
    llava = plan(ModelShape.from_model("LLaVA-OneVision-7B"), frames=64)
    assert (llava.layout.grid.num_tokens, llava.layout.structure_tokens) == (64 * 196, 1)
    assert llava.parts["vision tower"] == 2 * (64 * 3 * 384**2 + 64 * 729 * (2 * 1152 + 2 * 4304))
    assert ModelShape.from_model("Qwen2-VL-7B").tower_values(llava.layout.grid) == 4 * 64 * 196 * (
        3 * 14 * 14 * 2 + 2 * 1280 + 2 * 5120
    )
    assert plan(seven, gpus=4).kv_bytes == plan(seven).kv_bytes / 4
    assert plan(seven, gpus=8).kv_bytes == plan(seven).kv_bytes / 4, "a head cannot be shared"


@pytest.mark.parametrize("ratio", [0.1, 1.0])
@pytest.mark.parametrize("changes", [{}, {"memory": 24 * GIB}, {"max_model_len": 8192}, {"fps": 0.1}])
def test_the_longest_video_is_served_and_a_longer_one_is_not(
    seven: ModelShape, changes: dict[str, Any], ratio: float
) -> None:
    made = plan(seven, **changes)
    frames, limit = made.longest(ratio)
    assert frames % 2 == 0
    assert replace(made, frames=frames).fits(ratio)
    assert replace(made, frames=frames + 2).limit(ratio) == limit
    if "max_model_len" in changes:
        # floor(768 c * ratio) + 512 <= 8192
        assert (frames, limit) == ({0.1: 200, 1.0: 20}[ratio], "the context window")


def test_a_video_too_long_for_the_positions(seven: ModelShape) -> None:
    """2 positions a second: beyond 4 x 128,000 of them the model has no angles."""
    made = plan(seven, frames=4000, tokens=4, memory=1000 * GIB, fps=0.01)
    assert made.limit(0.1) == "the table of positions"


def test_nothing_fits(seven: ModelShape) -> None:
    made = plan(seven, memory=16 * GIB)
    assert (made.blocks, made.concurrent(0.1), made.longest(0.1)) == (0, 0, (0, "memory"))
    assert report(made, 0.1)["not_served_because"] == {"0.1": "memory", "1": "memory"}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "Qwen2.5-VL-7B", "--gpu-gib", "80", "--frames", "128", "--pixels", "768", "--ratio", "0.1"]
    main([*command, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["video"]["retained_tokens"] == 4915
    assert made["kv_tokens_saved_per_video"] == 49152 - 4915
    assert made["concurrent_videos"]["0.1"] > 8 * made["concurrent_videos"]["1"]
    assert made["memory_gib"]["cell cache"] == pytest.approx(0.04 * 80), "taken from what the KV cache gets"
    main([*command, "--json", "--cell-cache-gib", "0"])
    without = json.loads(capsys.readouterr().out)
    assert without["memory_gib"]["kv_cache"] == pytest.approx(made["memory_gib"]["kv_cache"] + 3.2, abs=0.01)
    main(command)
    text = capsys.readouterr().out
    assert "64 cells x 768 = 49,152 visual tokens, 4,915 kept, 0 structure" in text
    assert f"{made['longest_video']['0.1']['frames']:,} frames" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu-gib", "80"], "--model"),
        (["--model", "demo", "--gpu-gib", "0"], "must be a number > 0, got '0'"),
        (["--model", "demo", "--gpu-gib", "80", "--ratio", "1.5"], "must be a number in"),
        (["--model", "demo", "--gpu-gib", "80", "--frames", "nan"], "must be an integer > 0"),
        (["--model", "demo", "--gpu-gib", "80", "--cell-cache-gib", "-1"], "must be a number in [0, 4096], got '-1'"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


def test_names_as_score_serve_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "demo", "--gpu-gib", "8", "--max-frames", "32", "--retention", "0.25", "--json"])
    video = json.loads(capsys.readouterr().out)["video"]
    assert (video["frames"], video["retained_tokens"]) == (32, video["original_tokens"] // 4)
    with pytest.raises(SystemExit, match=r"--model 'nope' is no directory, no hub id \(owner/name\) and no short name"):
        main(["--model", "nope", "--gpu-gib", "80"])


def test_models_that_cannot_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no config\.json .*; give a directory that has one"):
        main(["--model", str(tmp_path), "--gpu-gib", "80"])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    with pytest.raises(UsageError, match="is a GPT2LMHeadModel; supported architectures"):
        ModelShape.from_model(str(tmp_path))
    hybrid = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {"model_type": "qwen3_5_text", "num_hidden_layers": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(hybrid))
    with pytest.raises(UsageError, match="for which no plan is made"):
        ModelShape.from_model(str(tmp_path))
