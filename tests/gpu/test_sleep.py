"""vLLM's sleep mode, with a real engine on a GPU: the policy is there when the server wakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("level", [1, 2])
def test_a_slept_engine_gives_the_same_answer(
    level: int, tiny_model: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "score")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from score_vllm.config import ServingConfig

    serving = ServingConfig(0.4, "score", policy=str(tiny_policy), max_frames=16)
    llm = LLM(
        model=str(tiny_model),
        hf_overrides=serving.to_overrides(),
        dtype="bfloat16",
        enforce_eager=True,
        enable_sleep_mode=True,
        max_model_len=2048,
        gpu_memory_utilization=0.3,
    )
    frames = np.random.default_rng(3).integers(0, 256, (16, 112, 112, 3), dtype=np.uint8)
    metadata = {"total_num_frames": 16, "fps": 2.0, "duration": 8.0, "video_backend": "test"}
    metadata |= {"frames_indices": list(range(16)), "do_sample_frames": False}
    prompt = {
        "prompt": "<|vision_start|><|video_pad|><|vision_end|>",
        "multi_modal_data": {"video": [(frames, metadata)]},
    }

    def answer() -> Any:
        llm.reset_prefix_cache()
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.engine_core.reset_encoder_cache()
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
        output = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        (status,) = llm.collective_rpc(lambda worker: worker.model_runner.get_model().compressor.policy.digest())
        return list(output.token_ids), output.cumulative_logprob, status

    before = answer()
    llm.sleep(level=level)
    if level == 1:
        llm.wake_up()
    else:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    after = answer()
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=1e-3)
    assert after[2] == before[2]
