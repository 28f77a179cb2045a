"""score-plan's numbers beside those of an engine that runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from score_vllm.plan import GIB, ModelShape, Plan


def parameters_of(directory: Path) -> int:
    """Numbers in a checkpoint."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def check_capacity(llm: Any, directory: Path) -> None:
    """Parameters, KV cache, requests at once and the largest video are what vLLM and the checkpoint say."""
    config = llm.llm_engine.vllm_config
    cache, window = config.cache_config, config.model_config.max_model_len
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY)
    limit = budget.processor.info.video_limit
    shape = ModelShape.from_model(str(directory))
    assert shape.parameters == parameters_of(directory)
    assert shape.row_values - model.row_width in (9, 12)

    size = next(model.parameters()).element_size()
    tokens = limit.tokens // -(-limit.max_frames // shape.frames_per_cell)
    options = {"weight_bytes": size, "value_bytes": size, "max_model_len": window, "block_size": cache.block_size}
    nothing = dict.fromkeys(("memory", "cell_cache", "reserve"), 0.0)
    plan = Plan(shape=shape, frames=limit.max_frames, tokens=tokens, **nothing, **options)
    # VLLM_CPU_KVCACHE_SPACE=1
    plan = replace(plan, memory=1.0 * GIB + sum(plan.parts.values()))
    assert plan.blocks == cache.num_gpu_blocks
    full = replace(plan, text_tokens=window - plan.prompt_tokens(0.02) + plan.text_tokens)
    assert full.prompt_tokens(0.02) == window
    assert full.concurrent(0.02) == int(cache.kv_cache_max_concurrency)
    assert plan.kv_tokens // window == cache.kv_cache_size_tokens // window

    assert plan.layout.grid.num_tokens == limit.tokens
    # The server counts the longest time stamp for every cell.
    assert plan.layout.structure_tokens <= limit.structure_tokens <= 2 * plan.layout.structure_tokens
    # None where vLLM measures a dummy video instead (LLaVA). The largest image may take more than the largest video.
    if (longest := budget.processor.info.get_mm_max_tokens_per_item(window, {"video": 1})) is not None:
        assert longest["video"] == limit.tokens + limit.structure_tokens
        assert budget.encoder_cache_size >= longest["video"]
