"""Sampling fields that the engine below cannot take, refused before they reach it."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType


def refuse_seed_on_cpu(engine_client: Any) -> None:
    """On the CPU engine answer 400 to a ``seed`` that would be used, on every route.

    vLLM 0.32 and 0.33 rewind the generator of a request whose prompt is cut into chunks, which only GPU generators can
    do: the engine would end, for everybody. At temperature 0 nothing is drawn, and a seed passes.
    """
    if not current_platform.is_cpu():
        return
    processor = engine_client.input_processor
    validate = processor._validate_params

    def refusing(params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, SamplingParams) and params.sampling_type == SamplingType.RANDOM_SEED:
            raise VLLMValidationError(
                f"seed {params.seed} is not supported by vLLM's CPU engine at temperature {params.temperature:g}; "
                "leave seed out, or set temperature to 0",
                parameter="seed",
            )
        return validate(params, *args, **kwargs)

    processor._validate_params = refusing
