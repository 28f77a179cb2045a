"""The tower in vLLM's CUDA graphs and a warm cell cache, with a real engine on a GPU: the answers stay the same."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


def answers(model: Path, policy: Path, graphs: bool, gib: float) -> tuple[list[list[int]], int, int]:
    """Tokens of each request, replays of encoder graphs, and cells that were reused."""
    from vllm import LLM, SamplingParams

    from score_vllm.config import ServingConfig

    serving = ServingConfig(0.4, "score", policy=str(policy), max_frames=16, cell_cache_gib=gib)
    llm = LLM(
        model=str(model),
        hf_overrides=serving.to_overrides(),
        dtype="bfloat16",
        max_model_len=2048,
        gpu_memory_utilization=0.3,
        compilation_config={"cudagraph_mm_encoder": graphs, "encoder_cudagraph_token_budgets": [64, 256]},
        seed=0,
    )
    frames = np.random.default_rng(3).integers(0, 256, (24, 112, 112, 3), dtype=np.uint8)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def ask(first: int, stop: int, ratio: float) -> list[int]:
        metadata = {"total_num_frames": stop - first, "fps": 2.0, "duration": 8.0, "video_backend": "test"}
        metadata |= {"frames_indices": list(range(stop - first)), "do_sample_frames": False}
        prompt = {
            "prompt": "<|vision_start|><|video_pad|><|vision_end|>",
            "multi_modal_data": {"video": [(frames[first:stop], metadata)]},
            "mm_processor_kwargs": {"retention_ratio": ratio},
        }
        return list(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)

    tokens = [ask(0, 8, 0.4), ask(0, 8, 0.2), ask(4, 12, 0.4), ask(0, 16, 0.3), ask(0, 4, 1.0)]

    def numbers(worker: Any) -> tuple[int, int]:
        from score_vllm.models.timing import _REUSED

        runner = worker.model_runner
        holder = getattr(runner, "encoder_runner", runner)  # the V2 runner has one
        manager = getattr(holder, "cudagraph_manager", None) or getattr(holder, "encoder_cudagraph_manager", None)
        reused = int(runner.get_model().compressor.stats._numbers[_REUSED])
        return 0 if manager is None else manager.graph_hits, reused

    ((hits, reused),) = llm.collective_rpc(numbers)
    return tokens, hits, reused


def end_engine() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def test_graphs_and_cache_change_no_answer(
    tiny_model: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights: near ties are rare, and a batch of another shape may round the tower's rows differently."""
    monkeypatch.setenv("VLLM_PLUGINS", "score")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    plain, hits, reused = answers(tiny_model, tiny_policy, graphs=False, gib=0)
    end_engine()
    assert (hits, reused) == (0, 0)
    cached, hits, reused = answers(tiny_model, tiny_policy, graphs=False, gib=0.1)
    end_engine()
    assert hits == 0
    assert reused >= 4 + 2 + 6 + 2
    assert cached == plain
    replayed, hits, reused = answers(tiny_model, tiny_policy, graphs=True, gib=0.1)
    assert hits > 0
    assert reused >= 4 + 2 + 6 + 2
    assert replayed == plain
