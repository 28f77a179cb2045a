from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from score_vllm import RetentionPolicy, demo


def test_demo_is_a_complete_checkpoint() -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model_dir, policy_dir = demo.ensure_demo()
    assert sum(p.stat().st_size for p in demo.ASSETS.rglob("*")) < 12e6
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir)
    ids = [processor.tokenizer.convert_tokens_to_ids(t) for t in demo.SPECIAL_TOKENS]
    assert len(set(ids)) == len(ids)
    assert None not in ids
    assert model.config.video_token_id == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    policy = RetentionPolicy.from_pretrained(policy_dir)
    assert policy.config.hidden_size == model.config.text_config.hidden_size
    record = json.loads((model_dir / "training.json").read_text())
    assert record["validation_accuracy"]["all"] >= 0.9


def test_a_package_without_the_demo_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no embedded demo"):
        demo.ensure_demo()


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


def test_demo_answers_about_its_clip() -> None:
    """The first thing that a newcomer asks, with all tokens and with a tenth."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from score_vllm import select_tokens
    from score_vllm.train.world.language_stage import Words, forward
    from score_vllm.train.world.question_blocks import blocks_right
    from score_vllm.train.world.scenes import make_clip
    from score_vllm.video import decode_video
    from score_vllm.vision.tower import VisionTower

    model_dir, policy_dir = demo.ensure_demo()
    scene, asked = make_clip("demo", demo.CLIP_INDEX)
    frames = decode_video(demo.demo_clip().read_bytes()).frames
    assert frames.shape == (scene.num_frames, 224, 224, 3)
    x, grid = VisionTower(model_dir).encode(frames)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    words = Words(AutoTokenizer.from_pretrained(model_dir))
    blocks = [words.block(question.text, question.answer) for question in asked]
    for ratio in (1.0, 0.4, 0.25, 0.1):
        made = select_tokens(x, ratio, policy=RetentionPolicy.from_pretrained(policy_dir), grid=grid)
        with torch.no_grad():
            logits, packed = forward(model, words, grid, [made.embeddings], [made.indices], [blocks])
        right = blocks_right(logits, packed).tolist()
        assert all(right), [question for question, ok in zip(asked, right, strict=True) if not ok]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path))
    assert demo.cache_directory() == tmp_path
    monkeypatch.delenv("SCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_directory() == tmp_path / "xdg" / "score-vllm"
