"""What is refused after a prompt has been rendered: the sampling field that the CPU engine would end by."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType

from score_vllm.models.processing import forget_items


def _check_seed(params: Any) -> None:
    """vLLM 0.32 and 0.33 rewind the generator of a request whose prompt is cut into chunks, which only GPU generators
    can do: a CPU engine would end, for everybody. At temperature 0 nothing is drawn, and a seed passes."""
    used = isinstance(params, SamplingParams) and params.sampling_type == SamplingType.RANDOM_SEED
    if used and current_platform.is_cpu():
        raise VLLMValidationError(
            f"seed {params.seed} is not supported by vLLM's CPU engine at temperature {params.temperature:g}; "
            "leave seed out, or set temperature to 0",
            parameter="seed",
        )


def guard_inputs(engine_client: Any) -> None:
    """On every route answer 400 to a seed that would end the engine.

    A request that is refused here, or by vLLM at the same place, has been rendered already, and vLLM's processor cache
    believes that the engine has its videos: they are forgotten, or the next request with them would fail.
    """
    processor = engine_client.input_processor
    process = processor.process_inputs

    def guarded(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _check_seed(params)
            return process(request_id, prompt, params, *args, **kwargs)
        except Exception:
            forget_items(engine_client.renderer.mm_processor_cache, prompt)
            raise

    processor.process_inputs = guarded
