"""The paper's table 3 on this machine: LLM prefill with and without compression, side by side in one run.

    python benchmarks/prefill_latency.py --model demo

Two vLLM engines live in this process: plain vLLM, and SCORE. First their answers are compared (at ratio 1 they must
be equal, and every ratio must keep exactly the tokens it should); only then is anything timed. Repetitions go round
robin over the rows, so that a slow spell of the machine hits all of them. "LLM forward" is the time inside the
language model until the first token; "compressor" is selection alone; the vision tower is the same in every row and
in neither.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_PLUGINS", "score")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import RESULTS, Sample, environment, table, write_results

PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n<|im_start|>assistant\n"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Engine:
    """A vLLM engine with stop-watches around the language model and the compressor."""

    def __init__(self, model: str, serving: Any, args: argparse.Namespace) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            hf_overrides=serving.to_overrides() if serving else {},
            dtype=args.dtype,
            enforce_eager=True,
            max_model_len=args.max_model_len,
            max_num_batched_tokens=args.max_model_len,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            seed=0,
        )
        self.seconds = {"forward": 0.0, "compressor": 0.0}
        module = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self._watch(module.language_model.model, "forward", "forward")
        if serving:
            self._watch(module.compressor, "compress", "compressor")

    def _watch(self, owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            out = inner(*args, **kwargs)
            synchronize()
            self.seconds[label] += time.perf_counter() - start
            return out

        setattr(owner, name, timed)

    def run(self, video: Any, ratio: float | None, num_tokens: int = 1) -> Any:
        """One request; ``self.seconds`` holds its times afterwards."""
        from vllm import SamplingParams

        request = {"prompt": PROMPT, "multi_modal_data": {"video": [video]}}
        if ratio is not None:
            request["mm_processor_kwargs"] = {"retention_ratio": ratio}
        self.seconds.update(forward=0.0, compressor=0.0)
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        (output,) = self.llm.generate([request], params, use_tqdm=False)
        return output


def make_video(args: argparse.Namespace, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A textured ground and a moving square; each seed is another video, so that no cache can answer."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 160, (args.height, args.width, 3), dtype=np.uint8)
    frames = np.repeat(ground[None], args.frames, axis=0)
    side = args.height // 4
    for i in range(args.frames):
        left = (args.width - side) * i // max(1, args.frames - 1)
        frames[i, side : 2 * side, left : left + side] = rng.integers(160, 256, 3)
    metadata = {
        "total_num_frames": args.frames,
        "fps": 2.0,
        "duration": args.frames / 2.0,
        "video_backend": "benchmark",
        "frames_indices": list(range(args.frames)),
        "do_sample_frames": False,
    }
    return frames, metadata


def check(vanilla: Engine, score: Engine, ratios: list[float], args: argparse.Namespace) -> dict[str, int]:
    """Answers before times: equal at ratio 1, exact counts at every ratio. Returns token counts per row."""
    from score_vllm import num_retained_tokens

    tokenizer = vanilla.llm.get_tokenizer()
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    video = make_video(args, seed=10**6)
    plain = vanilla.run(video, None, num_tokens=8)
    whole = score.run(video, 1.0, num_tokens=8)
    if plain.outputs[0].token_ids != whole.outputs[0].token_ids:
        sys.exit("correctness check failed: SCORE at ratio 1 and plain vLLM give different tokens; nothing was timed")
    original = list(plain.prompt_token_ids).count(pad)
    counts = {"original": original, "text": len(plain.prompt_token_ids) - original}
    for ratio in ratios:
        kept = list(score.run(video, ratio).prompt_token_ids).count(pad)
        if kept != num_retained_tokens(original, ratio):
            sys.exit(f"correctness check failed: ratio {ratio} kept {kept} of {original} tokens; nothing was timed")
        counts[str(ratio)] = kept
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo', or a Qwen2.5-VL directory or hub id")
    parser.add_argument("--policy", default=None, help="retention policy; by default the demo's, else seeded weights")
    parser.add_argument("--ratios", default="0.4,0.25,0.1", help="comma-separated, each in (0, 1)")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--height", type=int, default=336)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=None, help=f"results file (default: {RESULTS.name}/...)")
    args = parser.parse_args()
    try:
        ratios = [float(text) for text in args.ratios.split(",")]
        if not ratios or not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError
    except ValueError:
        parser.error(f"--ratios must be numbers in (0, 1) with commas between, got {args.ratios!r}")
    for name in ("frames", "height", "width", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")

    from score_vllm.config import ServingConfig
    from score_vllm.demo import ensure_demo

    model, policy = args.model, args.policy
    if model == "demo":
        directory, demo_policy = ensure_demo()
        model, policy = str(directory), policy or str(demo_policy)
    if policy is None:
        parser.error("--policy is needed for this model")
    vanilla = Engine(model, None, args)
    score = Engine(model, ServingConfig(1.0, policy=policy), args)

    print(f"{environment()['machine']}; {args.model}, {args.frames} frames of {args.width}x{args.height}, {args.dtype}")
    counts = check(vanilla, score, ratios, args)
    print("correctness: tokens equal plain vLLM at ratio 1; every ratio keeps exactly the tokens it should")

    rows: list[float | None] = [None, *ratios]
    times: dict[float | None, dict[str, list[float]]] = {row: {"forward": [], "compressor": []} for row in rows}
    with tqdm(total=len(rows) * args.repeats, desc="prefill", unit="run") as progress:
        for repeat in range(args.repeats):
            for row in rows:
                engine = vanilla if row is None else score
                engine.run(make_video(args, seed=repeat), row)
                for label, seconds in engine.seconds.items():
                    times[row][label].append(seconds * 1000)
                progress.update()

    results, printed = [], []
    base = Sample(tuple(times[None]["forward"])).median
    for row in rows:
        forward, compressor = (Sample(tuple(times[row][k])) for k in ("forward", "compressor"))
        both = zip(forward.values, compressor.values, strict=True)
        total = Sample(tuple(a + b for a, b in both))
        visual = counts["original"] if row is None else counts[str(row)]
        name = "vanilla" if row is None else f"SCORE {row:.0%}"
        results.append(
            {
                "row": name,
                "retention_ratio": row,
                "visual_tokens": visual,
                "total_tokens": visual + counts["text"],
                "compressor_ms": None if row is None else compressor.to_json(),
                "llm_forward_ms": forward.to_json(),
                "total_ms": total.to_json(),
                "speedup": base / total.median,
            }
        )
        shown = "-" if row is None else str(compressor)
        cells = [name, f"{visual} / {visual + counts['text']}", shown, str(forward), str(total)]
        printed.append([*cells, f"{base / total.median:.1f}x"])
    header = ["", "visual / total tokens", "compressor ms", "LLM forward ms", "total ms", "vs vanilla"]
    print(table(header, printed))
    output = args.output or RESULTS / f"prefill_latency_{Path(args.model).name}.json"
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    write_results(output, results, benchmark="prefill_latency", arguments=arguments)
    print(f"written: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
