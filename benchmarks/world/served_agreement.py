"""Does the server answer as the transformers path does? Held-out clips as files through score-serve, one question each.

    python -m benchmarks.world.served_agreement

The served text is right for this purpose when it is exactly what greedy decoding of the transformers path gives for
the same file, selection and question: every token of it (end of turn included) must be that path's first choice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import RESULTS, at_least, ratios, script_parser
from benchmarks.report import publish
from benchmarks.serving.process import free_port, running_process
from score_vllm import RetentionPolicy, select_tokens
from score_vllm.client import Client, chat_body, user_message
from score_vllm.demo import ensure_demo
from score_vllm.train.world.language_stage import Words, forward
from score_vllm.train.world.question_blocks import blocks_right
from score_vllm.train.world.render import render, write_clip
from score_vllm.train.world.scenes import make_clip
from score_vllm.video import decode_video
from score_vllm.vision.tower import VisionTower


@contextlib.contextmanager
def served(model: str, media: Path) -> Iterator[str]:
    """A score-serve in float32 on a free port; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "score_vllm.server.cli", "--model", model, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--allowed-local-media-path", str(media)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running_process(command, url, media / "server.log", environment):
        yield url


async def ask(url: str, clip: Path, question: str, ratio: float) -> tuple[str, dict[str, Any]]:
    """The served answer, and what the server says it kept."""
    messages = [user_message(clip.as_uri(), question)]
    async with Client(f"{url}/v1") as client:
        reply = await client.chat(chat_body("demo", messages, max_tokens=80, retention_ratio=ratio))
    return reply.text or "", (reply.score or {})["videos"][0]


def main() -> None:
    """Command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--clips", type=at_least(1), default=100)
    parser.add_argument("--ratios", type=ratios, default="1,0.25,0.1", help="with commas between")
    parser.add_argument("--output", type=Path, default=RESULTS / "served_agreement.json")
    args = parser.parse_args()
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model_path, policy_path = ensure_demo()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
    words = Words(AutoTokenizer.from_pretrained(model_path))
    tower, policy = VisionTower(model_path), RetentionPolicy.from_pretrained(policy_path)
    counts = {ratio: {"agree": 0, "right": 0} for ratio in args.ratios}
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder)
        with served("demo", media) as url:
            for index in tqdm(range(args.clips), desc="clips", unit="clip"):
                scene, asked = make_clip("held_out", index)
                clip = media / f"{index}.mp4"
                write_clip(render(scene).frames, clip)
                x, grid = tower.encode(decode_video(clip.read_bytes()).frames)
                for ratio in args.ratios:
                    text, kept = asyncio.run(ask(url, clip, asked[0].text, ratio))
                    made = select_tokens(x, ratio, "score", policy)
                    if kept["retained_tokens"] != made.num_retained or kept["grid"] != [grid.t, grid.h, grid.w]:
                        raise SystemExit(f"clip {index}: served {kept}, expected {made.num_retained} of {grid}")
                    blocks = [[words.block(asked[0].text, text)]]
                    with torch.inference_mode():
                        logits, packed = forward(model, words, grid, [made.embeddings], [made.indices], blocks)
                    counts[ratio]["agree"] += int(blocks_right(logits, packed)[0])
                    counts[ratio]["right"] += text == asked[0].answer
                clip.unlink()
    rows = [{"retention_ratio": ratio, "clips": args.clips, **counts[ratio]} for ratio in args.ratios]
    publish("served_agreement", args.output, rows)


if __name__ == "__main__":
    main()
