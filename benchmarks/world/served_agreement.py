"""Does the server answer as the transformers path does? Held-out clips as files through score-serve, one question each.

    python -m benchmarks.world.served_agreement
    python -m benchmarks.world.served_agreement --model path/to/checkpoint --policy path/to/policy

The served text must be exactly what greedy decoding of the transformers path gives for the same file, selection and
question, to the same number of tokens. Any supported family; only the demo's answers can be right, too.
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

from tqdm import tqdm

from benchmarks.harness import RESULTS, RUNS, at_least, ratios, script_parser
from benchmarks.in_process import InProcess
from benchmarks.report import publish
from benchmarks.serving.process import free_port, running_process
from score_vllm.client import Client, Endpoint, Reply, chat_body, user_message
from score_vllm.demo import ensure_demo
from score_vllm.train.world.render import render, write_clip
from score_vllm.train.world.scenes import make_clip

MODEL = "served"
MAX_TOKENS = 80
UNFINISHED = "\ufffd"


@contextlib.contextmanager
def served(model: str, policy: str | None, media: Path) -> Iterator[str]:
    """A score-serve in float32 on a free port; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "score_vllm.server.cli", "--model", model, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--allowed-local-media-path", str(media)]
    command += ["--served-model-name", MODEL, *(["--policy", policy] if policy else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running_process(command, url, media / "server.log", environment):
        yield url


async def ask(endpoint: Endpoint, clip: Path, question: str, ratio: float) -> Reply:
    """The answer about a file, with what was kept."""
    messages = [user_message(clip.as_uri(), question)]
    return await endpoint.chat(chat_body(MODEL, messages, max_tokens=MAX_TOKENS, retention_ratio=ratio))


def same(served_reply: Reply, own: Reply) -> bool:
    """True where the texts agree.

    Raises:
        SystemExit: the two did not keep the same number of tokens of the same grid.
    """
    counts = [(reply.score or {})["videos"][0] for reply in (served_reply, own)]
    for name in ("grid", "retained_tokens", "structure_tokens"):
        if counts[0][name] != counts[1][name]:
            raise SystemExit(f"{name}: served {counts[0][name]}, expected {counts[1][name]}")
    if served_reply.prompt_tokens != own.prompt_tokens:
        raise SystemExit(f"prompt tokens: served {served_reply.prompt_tokens}, expected {own.prompt_tokens}")
    # A server holds an unfinished character back.
    return (served_reply.text or "").rstrip(UNFINISHED) == (own.text or "").rstrip(UNFINISHED)


async def compare(url: str, own: InProcess, args: Any, media: Path) -> list[dict[str, Any]]:
    """A row per ratio: answers that agree, and that are right."""
    counts = {ratio: {"agree": 0, "right": 0} for ratio in args.ratios}
    async with Client(f"{url}/v1") as client, own:
        for index in tqdm(range(args.clips), desc="clips", unit="clip"):
            scene, asked = make_clip("held_out", index)
            clip = media / f"{index}.mp4"
            write_clip(render(scene).frames, clip)
            for ratio in args.ratios:
                replies = [await ask(endpoint, clip, asked[0].text, ratio) for endpoint in (client, own)]
                counts[ratio]["agree"] += same(*replies)
                counts[ratio]["right"] += replies[0].text == asked[0].answer
            clip.unlink()
    return [{"retention_ratio": ratio, "clips": args.clips, **counts[ratio]} for ratio in args.ratios]


def main() -> None:
    """Command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--clips", type=at_least(1), default=100)
    parser.add_argument("--ratios", type=ratios, default="1,0.25,0.1", help="with commas between")
    parser.add_argument("--model", default="demo", help="the demo, or a checkpoint's directory")
    parser.add_argument("--policy", help="--model: directory of its retention policy; without one vidcom2 selects")
    parser.add_argument("--output", type=Path, help="default: in results/ for the demo, else in runs/")
    args = parser.parse_args()
    demo = args.model == "demo"
    model, policy = map(str, ensure_demo()) if demo else (args.model, args.policy)
    output = args.output or (RESULTS if demo else RUNS) / "served_agreement.json"
    own = InProcess(model, policy)
    with tempfile.TemporaryDirectory() as folder, served(args.model, args.policy, Path(folder)) as url:
        rows = asyncio.run(compare(url, own, args, Path(folder)))
    publish("served_agreement", output, rows, model=args.model)


if __name__ == "__main__":
    main()
