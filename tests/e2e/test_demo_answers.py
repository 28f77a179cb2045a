"""The embedded demo answers rightly through the server, and exactly as the transformers path does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from score_vllm import RetentionPolicy, demo, select_tokens


def ask(server: Any, clip: Path, question: str, ratio: float) -> str:
    content = [{"type": "video_url", "video_url": {"url": f"file://{clip}"}}, {"type": "text", "text": question}]
    answer = (
        server.client()
        .with_options(max_retries=2)
        .chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=80,
            extra_body={"retention_ratio": ratio},
        )
    )
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_first_questions_of_a_newcomer_are_answered(server: Any, ratio: float) -> None:
    from score_vllm.train.world.scenes import make_clip

    clip = shutil.copy(demo.demo_clip(), server.media / "demo.mp4")
    _, asked = make_clip("demo", demo.CLIP_INDEX)
    answers = {q.text: (ask(server, clip, q.text, ratio), q.answer) for q in asked}
    assert all(got == wanted for got, wanted in answers.values()), answers


def test_served_answers_are_the_transformers_paths(server: Any) -> None:
    """Where the transformers path is sure (float32 there, the server's own dtype here), the server says the same."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from score_vllm.train.world.language_stage import Words, forward
    from score_vllm.train.world.render import render, write_clip
    from score_vllm.train.world.scenes import make_clip
    from score_vllm.video import decode_video
    from score_vllm.vision.tower import VisionTower

    model_dir, policy_dir = demo.ensure_demo()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    words = Words(AutoTokenizer.from_pretrained(model_dir))
    tower, policy = VisionTower(model_dir), RetentionPolicy.from_pretrained(policy_dir)
    sure = 0
    for index in range(8):
        scene, asked = make_clip("served", index)
        clip = server.media / f"served-{index}.mp4"
        write_clip(render(scene).frames, clip)
        x, grid = tower.encode(decode_video(clip.read_bytes()).frames)
        made = select_tokens(x, 0.1, policy=policy, grid=grid)
        text = ask(server, clip, asked[0].text, 0.1)
        blocks = [[words.block(asked[0].text, text)]]
        with torch.no_grad():
            logits, packed = forward(model, words, grid, [made.embeddings], [made.indices], blocks)
        best = logits.topk(2).values
        if bool((best[:, 0] - best[:, 1] > 1.0).all()):
            sure += 1
            assert logits.argmax(-1).tolist() == packed.targets.tolist(), (index, asked[0], text)
    assert sure >= 4, "too few clear answers to compare"
