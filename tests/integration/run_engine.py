"""Run a few prompts through an engine in a process of its own and print the tokens as JSON.

Usage: run_engine.py MODEL_DIR POLICY_DIR|- TENSOR_PARALLEL_SIZE DTYPES

DTYPES have commas between; one engine runs after the other. With ``-`` for the policy the engine is plain vLLM: no
plug-in is loaded at all.
"""

import json
import os
import sys


def main() -> None:
    model, policy, parallel, dtypes = sys.argv[1:5]
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_PLUGINS="" if policy == "-" else "score",
        VLLM_LOGGING_LEVEL="WARNING",
        HF_HUB_OFFLINE="1",
        # One rank runs in this process, which saves the start of another.
        VLLM_ENABLE_V1_MULTIPROCESSING="0" if parallel == "1" else "1",
    )
    result = {dtype: run(model, policy, int(parallel), dtype) for dtype in dtypes.split(",")}
    print("RESULT " + json.dumps(result), flush=True)  # noqa: T201


def run(model: str, policy: str, parallel: int, dtype: str) -> dict[str, list[list[int]]]:
    """Tokens of each prompt by retention ratio."""
    import numpy as np
    from vllm import LLM, SamplingParams

    compressed = policy != "-"
    options = {}
    if compressed:
        from score_vllm.config import ServingConfig
        from score_vllm.models.worker import WORKER_EXTENSION

        options["worker_extension_cls"] = WORKER_EXTENSION
        options["hf_overrides"] = ServingConfig(retention_ratio=1.0, policy=policy).to_overrides()
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=4096,
        tensor_parallel_size=parallel,
        block_size=32,
        max_num_batched_tokens=256,
        seed=0,
        **options,
    )
    identities = spy_on_identities(llm) if compressed else []
    rng = np.random.default_rng(11)

    def video(frames: int, height: int, width: int, fps: float) -> tuple:
        metadata = {
            "total_num_frames": frames,
            "fps": fps,
            "duration": frames / fps,
            "video_backend": "test",
            "frames_indices": list(range(frames)),
            "do_sample_frames": False,
        }
        return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), metadata

    span = "<|vision_start|><|video_pad|><|vision_end|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [
        {"prompt": f"Look {span} now", "multi_modal_data": {"video": [video(16, 112, 168, 2.0)]}},
        {"prompt": f"{span}{span}?", "multi_modal_data": {"video": [video(12, 84, 84, 4.0), video(30, 56, 84, 0.5)]}},
        {
            "prompt": f"{image} and {span}",
            "multi_modal_data": {
                "video": [video(20, 84, 84, 1.3)],
                "image": [rng.integers(0, 256, (84, 112, 3), dtype=np.uint8)],
            },
        },
        {"prompt": "No video at all."},
    ]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    result = {"1.0": [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]}
    if compressed:
        for ratio in (0.4, 0.1):
            asked = [{**p, "mm_processor_kwargs": {"retention_ratio": ratio}} for p in prompts]
            result[str(ratio)] = [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]
        first, *others = llm.collective_rpc("score_selections", args=(identities,))
        assert len(others) == parallel - 1
        assert all(other == first for other in others), "ranks kept different tokens"
        result["masks"] = [found["kept_mask"] for found in first]
    llm.llm_engine.engine_core.shutdown()
    return result


def spy_on_identities(llm: object) -> list[str]:
    """Filled with the identity of every video that the processor sees."""
    processor, found = llm.llm_engine.renderer.get_mm_processor(), []
    apply = processor.apply

    def spy(*args: object, **kwargs: object) -> object:
        result = apply(*args, **kwargs)
        found.extend(report.identity for report in result["score"])
        return result

    processor.apply = spy
    return found


if __name__ == "__main__":
    main()
