from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from score_vllm import RetentionPolicy, demo


def build(cache: str) -> str:
    return str(demo.ensure_demo(Path(cache))[0])


def test_two_starts_at_once_build_one_demo(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(build, [str(tmp_path)] * 2)
    assert first == second
    folders = [p.name for p in tmp_path.iterdir() if p.is_dir()]
    assert len(folders) == 1, "nothing half-built may stay behind"


def test_demo_is_a_complete_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model_dir, policy_dir = demo.ensure_demo(tmp_path)
    stamp = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert demo.ensure_demo(tmp_path) == (model_dir, policy_dir)
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == stamp, "built once"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir)
    ids = [processor.tokenizer.convert_tokens_to_ids(t) for t in demo.SPECIAL_TOKENS]
    assert len(set(ids)) == len(ids)
    assert None not in ids
    assert model.config.video_token_id == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    policy = RetentionPolicy.from_pretrained(policy_dir)
    assert policy.config.hidden_size == model.config.text_config.hidden_size
    assert "not trained" in policy.config.provenance["origin"]


def test_chat_format() -> None:
    tokenizer = demo.build_tokenizer()
    video = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}
    assert tokenizer.apply_chat_template([video], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = "héllo ∑ 你好 🎥"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_same_seed_same_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name in ("a", "b"):
        demo.build_model(tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sample_clip(tmp_path: Path) -> None:
    from score_vllm.video import decode_video

    path = demo.ensure_demo_clip(tmp_path)
    assert demo.ensure_demo_clip(tmp_path) == path
    assert decode_video(path.read_bytes()).frames.shape[1:] == (180, 320, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path))
    assert demo.cache_directory() == tmp_path
    monkeypatch.delenv("SCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_directory() == tmp_path / "xdg" / "score-vllm"
