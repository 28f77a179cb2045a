"""The vLLM plug-in: runs in every process of a server, imports nothing heavy, does nothing twice."""

from __future__ import annotations

from score_vllm.architectures import SUPPORTED

# For vLLM's --ec-manager-config.
ENCODER_CACHE_MANAGER = "score_vllm.models.encoder_budget.EncodedTokensCacheManager"

_registered = False


def register() -> None:
    """Entry point of ``vllm.general_plugins``; models without a serving configuration behave as in plain vLLM."""
    global _registered
    if _registered:
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from score_vllm.models.sequential import SequentialPositionsConfig

    for architecture in SUPPORTED:
        ModelRegistry.register_model(architecture.name, architecture.target)
        if architecture.sequential:
            MODELS_CONFIG_MAP[architecture.name] = SequentialPositionsConfig
    _registered = True


def is_registered() -> bool:
    """True where :func:`register` has run in this process. vLLM swallows plug-in errors, so callers check."""
    return _registered
