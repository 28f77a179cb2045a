"""One question about one video through vLLM's `LLM` class, with and without compression.

Purpose: how the plug-in is switched on without a server. Hardware: any; on two CPU cores the demo model takes about a
minute, nearly all of it vLLM's start. For a real model pass --model and, for the method score, --policy.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ["VLLM_PLUGINS"] = "score"  # before vLLM is imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument("--question", default="What happens?")
    parser.add_argument("--retention", type=float, default=0.1, metavar="RATIO", help="in (0, 1] (default: 0.1)")
    parser.add_argument("--model", help="a Qwen2.5-VL: directory or hub id (default: the demo)")
    parser.add_argument("--policy", help="directory of a retention policy (default: the demo's)")
    args = parser.parse_args()

    from score_vllm.config import ServingConfig
    from score_vllm.demo import ensure_demo
    from score_vllm.video import decode_video

    model, policy = map(str, ensure_demo()) if args.model is None else (args.model, args.policy)
    method = "score" if policy else "vidcom2"
    try:
        video = decode_video(args.video.read_bytes())
        serving = ServingConfig(retention_ratio=args.retention, method=method, policy=policy)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    from vllm import LLM, SamplingParams  # takes a while: after what can be wrong

    llm = LLM(model, hf_overrides=serving.to_overrides(), enforce_eager=True, max_model_len=8192)
    content = [{"type": "video"}, {"type": "text", "text": args.question}]
    messages = [{"role": "user", "content": content}]
    template = llm.get_tokenizer().apply_chat_template
    prompt = {
        "prompt": template(messages, tokenize=False, add_generation_prompt=True),
        "multi_modal_data": {"video": [(video.frames, video.metadata())]},
    }
    # A request may ask for another ratio than the engine's default.
    prompts = [prompt, {**prompt, "mm_processor_kwargs": {"retention_ratio": 1.0}}]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0))
    for ratio, output in zip((args.retention, 1.0), outputs, strict=True):
        print(f"ratio {ratio:g}: {len(output.prompt_token_ids)} prompt tokens: {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
