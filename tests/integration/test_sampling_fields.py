"""Sampling fields over a video that is cut into chunks: each is served, and the engine lives on."""

from __future__ import annotations

import math
import re
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from score_vllm.server.sampling import guard_inputs
from tests.integration.conftest import CHUNK, Engine, make_video

PROMPT = "Look <|vision_start|><|video_pad|><|vision_end|> now"


def run(engine: Engine, seed: int = 9400, **fields: Any) -> Any:
    prompt = {
        "prompt": PROMPT,
        "multi_modal_data": {"video": [make_video(16, 112, 112, seed)]},
        "mm_processor_kwargs": {"retention_ratio": 0.4},
    }
    params = SamplingParams(**{"max_tokens": 4, "temperature": 0, **fields})
    (output,) = engine.llm.generate([prompt], params, use_tqdm=False)
    assert len(output.prompt_token_ids) > 3 * CHUNK, "the video must span several chunks"
    return output


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[int]:
    return list(run(engine, ignore_eos=True).outputs[0].token_ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "temperature": 1.0},
        {"n": 2, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
        {"logit_bias": {7: 100.0}},
        {"min_tokens": 3, "stop": ["a", "e"]},
        {"logprobs": 5},
        {"prompt_logprobs": 2},
        {"prompt_logprobs": 0, "logprobs": 0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"bad_words": ["the"]},
        {"allowed_token_ids": [5, 6, 7]},
        {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"]), "max_tokens": 8},
        {"structured_outputs": StructuredOutputsParams(regex="[ab]{4}"), "max_tokens": 8},
        {"structured_outputs": StructuredOutputsParams(json={"type": "integer"}), "max_tokens": 4},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_field_is_served_and_the_engine_lives_on(fields: dict[str, Any], engine: Engine, plain: list[int]) -> None:
    fresh = 9500 + zlib.crc32(str(fields).encode()) % 1000
    output = run(engine, fresh, **fields)
    assert len(output.outputs) == fields.get("n", 1)
    first = output.outputs[0]
    if "logit_bias" in fields:
        assert set(first.token_ids) == {7}
    if "allowed_token_ids" in fields:
        assert set(first.token_ids) <= {5, 6, 7}
    if "min_tokens" in fields:
        assert len(first.token_ids) >= 3
    if "logprobs" in fields:
        assert len(first.logprobs) == len(first.token_ids)
        assert all(math.isfinite(entry.logprob) for step in first.logprobs for entry in step.values())
    if "prompt_logprobs" in fields:
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        entries = [entry.logprob for step in output.prompt_logprobs[1:] for entry in step.values()]
        assert all(math.isfinite(value) and value <= 0 for value in entries)
    if "structured_outputs" in fields:
        assert re.fullmatch("yes|no|[ab]{4}|-?[0-9]+", first.text)
    assert list(run(engine, ignore_eos=True).outputs[0].token_ids) == plain


def test_a_preempted_video_is_computed_again_to_the_same_tokens(engine: Engine) -> None:
    """The cache is filled up, so that requests push each other out in the middle of their answers."""
    core = engine.llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    prompts = [
        {
            "prompt": PROMPT,
            "multi_modal_data": {"video": [make_video(16, 112, 112, 9600 + n)]},
            "mm_processor_kwargs": {"retention_ratio": 0.4},
        }
        for n in range(3)
    ]
    alone = [engine.llm.generate([p], params, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    engine.llm.reset_prefix_cache()
    preempted: list[str] = []
    preempt = core.scheduler._preempt_request

    def spy(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    held = pool.get_new_blocks(pool.get_num_free_blocks() - 12)
    core.scheduler._preempt_request = spy
    try:
        together = engine.llm.generate(prompts, params, use_tqdm=False)
    finally:
        core.scheduler._preempt_request = preempt
        pool.free_blocks(held)
    assert preempted, "nothing was preempted: the cache was too large for this test"
    assert [output.outputs[0].token_ids for output in together] == alone


def test_a_seed_that_would_end_the_cpu_engine_is_refused_and_its_videos_forgotten() -> None:
    """vLLM's processor cache would otherwise send the next request without them."""
    asked: list[Any] = []
    forgotten: list[str] = []
    client: Any = SimpleNamespace(
        input_processor=SimpleNamespace(process_inputs=lambda *args: asked.append(args)),
        renderer=SimpleNamespace(mm_processor_cache=SimpleNamespace(invalidate=forgotten.append)),
    )
    guard_inputs(client)
    process = client.input_processor.process_inputs
    prompt = {"type": "multimodal", "mm_hashes": {"video": ["a", "b"], "image": ["c"]}}
    with pytest.raises(VLLMValidationError, match=r"seed 3 is not supported by vLLM's CPU engine at temperature 0.7"):
        process("1", prompt, SamplingParams(seed=3, temperature=0.7))
    assert asked == []
    assert forgotten == ["a", "b", "c"]
    for params in (SamplingParams(seed=3, temperature=0), SamplingParams(temperature=0.7)):
        process("2", prompt, params)
    assert len(asked) == 2
    assert len(forgotten) == 3


def test_a_generator_on_the_cpu_cannot_be_rewound() -> None:
    """What vLLM does to the generator of a chunked prompt. Once this fails, the refusal can go."""
    generator = torch.Generator(device="cpu")
    with pytest.raises((AttributeError, RuntimeError)):
        generator.set_offset(generator.get_offset() - 4)
