"""The vLLM plug-in: runs in every process of a server, imports nothing heavy, does nothing twice."""

from __future__ import annotations

# vLLM's architecture name -> our class, as a string: vLLM imports it when such a model is loaded.
ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "score_vllm.models.qwen2_5_vl:ScoreQwen2_5_VLForConditionalGeneration",
}
# For vLLM's --ec-manager-config.
ENCODER_CACHE_MANAGER = "score_vllm.models.encoder_budget.EncodedTokensCacheManager"

_registered = False


def register() -> None:
    """Entry point of ``vllm.general_plugins``; models without a serving configuration behave as in plain vLLM."""
    global _registered
    if _registered:
        return
    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
    _registered = True


def is_registered() -> bool:
    """True where :func:`register` has run in this process. vLLM swallows plug-in errors, so callers check."""
    return _registered
