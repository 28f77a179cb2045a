"""The prefill benchmark end to end on a model of a few thousand weights: its checks run, its file fits the schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
}
QWEN2_5: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {
        **TEXT,
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 1,
        "fullatt_block_indexes": [0],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "text_config": {
        **TEXT,
        "model_type": "qwen3_vl_text",
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
    },
    "vision_config": {
        "model_type": "qwen3_vl_vision",
        "deepstack_visual_indexes": [0, 1],
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def small_preset(folder: Path, config: dict[str, Any]) -> Path:
    """A preset like ``paper`` (random weights, two videos), but for a CPU and in fp32."""
    path = folder / f"{config['model_type']}.json"
    preset = {
        "description": "test",
        "weights": "random",
        "dtype": "float32",
        "needs_gpu": False,
        "videos": [[6, 4, 5], [1, 2, 3]],
        "text_tokens": 91,
        "engines": ["transformers"],
        "repeats": 2,
        "config": config,
    }
    path.write_text(json.dumps(preset))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "prefill_latency.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)


def check_file(path: Path, engines: list[str], methods: list[str], extra_text: int = 0) -> None:
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["environment"]["machine"]
    rows = [row for row in document["rows"] if "not_run" not in row]
    each = [(None, None), *[(method, ratio) for method in methods for ratio in (0.5, 0.4, 0.25, 0.1)]]
    want = [(engine, *key) for engine in engines for key in each]
    assert [(row["engine"], row["method"], row["retention_ratio"]) for row in rows] == want
    # floor(126 r) would be wrong: each video keeps its own floor, and at least one token.
    kept = {None: 126, 0.5: 63, 0.4: 50, 0.25: 31, 0.1: 13}
    for row in rows:
        assert row["visual_tokens"] == kept[row["retention_ratio"]]
        assert row["total_tokens"] == row["visual_tokens"] + 91 + extra_text
        assert len(row["total_ms"]["values"]) == 2
        assert row["flop_bound"] >= 1.0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_both_engines_with_random_weights(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    preset, out = small_preset(tmp_path, QWEN2_5), tmp_path / "out.json"
    chosen = ["--engines", "transformers,vllm", "--methods", "score,fastvid", "--ratios", "0.5"]
    done = run("--preset", preset, *chosen, "--output", out)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    check_file(out, ["transformers", "vllm"], ["score", "fastvid"])
    rows = json.loads(out.read_text())["rows"]
    assert {(row["method"], row["in_tree"]) for row in rows if "not_run" in row} <= {("evs", True)}


def test_qwen3_vl_through_transformers(tmp_path: Path) -> None:
    preset, out = small_preset(tmp_path, QWEN3), tmp_path / "out.json"
    done = run("--preset", preset, "--methods", "all", "--ratios", "0.5", "--output", out)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    from score_vllm import methods

    names = ["score", *[name for name in methods.names() if methods.get(name).weights is None]]
    check_file(out, ["transformers"], names, extra_text=7 * 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nosuch"], "preset must be one of"),
        (["--ratios", "1.5"], "--ratios: must be numbers in (0, 1]"),
        (["--methods", "nosuch"], "method must be one of"),
        (["--engines", "nosuch"], "engine must be one of"),
        (["--repeats", "0"], "--repeats: must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_engines_have_no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows ask about the same videos: what one has computed must not be missing from another's time."""
    vllm = pytest.importorskip("vllm")
    seen: dict[str, Any] = {}

    class StoppedError(Exception):
        pass

    def llm(**options: Any) -> None:
        seen.update(options)
        raise StoppedError

    monkeypatch.setattr(os, "environ", dict(os.environ))  # which the module below writes to
    monkeypatch.setattr(vllm, "LLM", llm, raising=False)
    from benchmarks.engine import Engine
    from score_vllm.config import ServingConfig

    with pytest.raises(StoppedError):
        Engine("model", ServingConfig(0.5, "uniform"), dtype="float32", length=64)
    assert seen["hf_overrides"]["score"]["cell_cache_gib"] == 0
    assert seen["mm_processor_cache_gb"] == 0
    assert not seen["enable_prefix_caching"]
