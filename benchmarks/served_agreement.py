"""Does the server answer as the transformers path does? Held-out clips as files through score-serve, one question each.

    python benchmarks/served_agreement.py

The served text is right for this purpose when it is exactly what greedy decoding of the transformers path gives for
the same file, selection and question: every token of it (end of turn included) must be that path's first choice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, table, write_results
from serving import free_port, stop
from tqdm import tqdm

from score_vllm import RetentionPolicy, select_tokens
from score_vllm.demo import ensure_demo
from score_vllm.train.world.language_stage import Words, forward
from score_vllm.train.world.question_blocks import blocks_right
from score_vllm.train.world.render import render, write_clip
from score_vllm.train.world.scenes import make_clip
from score_vllm.video import decode_video
from score_vllm.vision.tower import VisionTower


@contextmanager
def served(model: str, media: Path, log: Path) -> Iterator[str]:
    """A score-serve in float32 on a free port; yields its URL.

    Raises:
        RuntimeError: it ended, or was not ready within four minutes.
    """
    port = free_port()
    command = [str(Path(sys.executable).parent / "score-serve"), "--model", model, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--allowed-local-media-path", str(media)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 240
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"score-serve did not start:\n{log.read_text(errors='replace')[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def ask(url: str, clip: Path, question: str, ratio: float) -> tuple[str, dict[str, Any]]:
    """The served answer, and what the server says it kept."""
    content = [{"type": "video_url", "video_url": {"url": f"file://{clip}"}}, {"type": "text", "text": question}]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 80}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({**body, "retention_ratio": ratio}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.loads(response.read())
    return answer["choices"][0]["message"]["content"], answer["score"]["videos"][0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--ratios", default="1,0.25,0.1")
    parser.add_argument("--output", type=Path, default=RESULTS / "served_agreement.json")
    args = parser.parse_args()
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model_path, policy_path = ensure_demo()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).eval()
    words = Words(AutoTokenizer.from_pretrained(model_path))
    tower, policy = VisionTower(model_path), RetentionPolicy.from_pretrained(policy_path)
    ratios = [float(text) for text in args.ratios.split(",")]
    counts = {ratio: {"agree": 0, "right": 0} for ratio in ratios}
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder)
        with served("demo", media, media / "server.log") as url:
            for index in tqdm(range(args.clips), desc="clips", unit="clip"):
                scene, asked = make_clip("held_out", index)
                clip = media / f"{index}.mp4"
                write_clip(render(scene).frames, clip)
                x, grid = tower.encode(decode_video(clip.read_bytes()).frames)
                for ratio in ratios:
                    text, kept = ask(url, clip, asked[0].text, ratio)
                    made = select_tokens(x, ratio, "score", policy)
                    if kept["retained_tokens"] != made.num_retained or kept["grid"] != [grid.t, grid.h, grid.w]:
                        raise SystemExit(f"clip {index}: served {kept}, expected {made.num_retained} of {grid}")
                    blocks = [[words.block(asked[0].text, text)]]
                    with torch.inference_mode():
                        logits, packed = forward(model, words, grid, [made.embeddings], [made.indices], blocks)
                    counts[ratio]["agree"] += int(blocks_right(logits, packed)[0])
                    counts[ratio]["right"] += text == asked[0].answer
                clip.unlink()
    rows = [{"retention_ratio": ratio, "clips": args.clips, **counts[ratio]} for ratio in ratios]
    write_results(args.output, rows)
    cells = [[f"{r['retention_ratio']:g}", str(r["agree"]), str(r["right"]), str(r["clips"])] for r in rows]
    print(table(["ratio", "same answer", "right answer", "clips"], cells))


if __name__ == "__main__":
    main()
