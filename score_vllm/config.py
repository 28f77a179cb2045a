"""The configuration stored beside every policy's weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from score_vllm.budget import check_retention_ratio

FORMAT_VERSION = 1
# Of policies whose file names no architecture: when they were written there was only this one.
FIRST_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


def default_policy_width(hidden_size: int) -> int:
    """Width H of the policy's one hidden layer: 512 for D >= 1024, else max(64, D)."""
    return 512 if hidden_size >= 1024 else max(64, hidden_size)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Shape and origin of a :class:`~score_vllm.policy.RetentionPolicy`.

    Attributes:
        hidden_size: D, width of the visual tokens the policy reads (the LLM's hidden size).
        policy_width: H, width of the policy's one hidden layer.
        model_id: the model it was trained for, as given to ``--model``; informative.
        architecture: vLLM's name of that model's architecture; served with no other. Empty: :data:`FIRST_ARCHITECTURE`.
        method: always ``"score"``: the file says what made it.
        use_residual: False is the paper's ablation without the surprise signal (table 5).
        ranked_share: share of a video's tokens that the logits choose; what a budget has beyond is spread evenly over
            time and space (not in the paper). 1: the logits choose all.
        provenance: free-form record of how it was made: commit, data, versions, arguments.
        format_version: of this file.
    """

    hidden_size: int
    policy_width: int
    model_id: str = ""
    architecture: str = ""
    method: str = "score"
    use_residual: bool = True
    ranked_share: float = 1.0
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("hidden_size", "policy_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"policy config: {name} must be an integer >= 1, got {value!r}")
        if self.method != "score":
            raise ValueError(f"policy config: method must be 'score', got {self.method!r}")
        if not isinstance(self.use_residual, bool):
            raise ValueError(f"policy config: use_residual must be true or false, got {self.use_residual!r}")
        share = self.ranked_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"policy config: ranked_share must be a number in (0, 1], got {share!r}")
        if not isinstance(self.architecture, str):
            raise ValueError(f"policy config: architecture must be a string, got {self.architecture!r}")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"policy config: format_version must be {FORMAT_VERSION}, got {self.format_version!r}; "
                "the file was written by another version of score-vllm"
            )

    def to_json(self) -> str:
        """Stable, human-readable JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> PolicyConfig:
        """Read ``config.json``.

        Raises:
            ValueError: not JSON, unknown or missing keys, or values out of range; the message names the file.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"{path} has unknown keys {unknown}; known keys are {sorted(known)}")
        if missing := sorted({"hidden_size", "policy_width"} - set(raw)):
            raise ValueError(f"{path} lacks the keys {missing}")
        try:
            return cls(**raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# Attribute of the Hugging Face config that carries the serving configuration into every process of the engine.
HF_CONFIG_KEY = "score"

# Most frames read of a video (paper section 5.1).
DEFAULT_MAX_FRAMES = 128

# For VLLM_MEDIA_CONNECTOR: fetches videos for our loaders under their limits.
MEDIA_CONNECTOR = "score"

# Least pixel limit of a frame: one visual token of every supported model.
MIN_PIXELS = 32 * 32

# Speculative decoding without a draft model, which would read uncompressed positions.
SPECULATIVE_METHODS = ("ngram", "suffix")


# Above the memory of any machine: more is a number of bytes.
MAX_CELL_CACHE_GIB = 4096
# Where nothing is said: on a CPU, and of a GPU's memory.
_CELL_CACHE_CPU_BYTES = 1 << 30
_CELL_CACHE_GPU_SHARE = 0.04


def cell_cache_bytes(gib: float | None, gpu_bytes: float | None) -> int:
    """Size of a worker's cell cache.

    Args:
        gib: what was asked for; None: the default.
        gpu_bytes: memory of the worker's GPU; None on a CPU.
    """
    if gib is not None:
        return int(gib * (1 << 30))
    return _CELL_CACHE_CPU_BYTES if gpu_bytes is None else int(_CELL_CACHE_GPU_SHARE * gpu_bytes)


def check_cell_cache_gib(value: Any, name: str = "score config: cell_cache_gib") -> float:
    """The size as a float.

    Raises:
        ValueError: it is not a number in [0, 4096].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_CELL_CACHE_GIB:
        raise ValueError(f"{name} must be a number of GiB in [0, {MAX_CELL_CACHE_GIB}], got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """How one server compresses. Travels as ``hf_overrides={"score": {...}}`` to every process of the engine.

    Attributes:
        retention_ratio: default rho for requests that name none, in (0, 1].
        method: name of the selection method for requests that name none.
        allowed_methods: names that a request may choose instead; empty means no choice.
        policy: directory of the retention policy, for ``method="score"``.
        policy_digest: :meth:`score_vllm.policy.RetentionPolicy.digest` of that policy; part of every cache key.
        max_frames: most frames of a video; with ``max_pixels`` the size that memory is reserved for.
        max_pixels: most pixels of a frame after resizing; None is 768 tokens a cell, or the checkpoint's own limit
            where that is lower.
        selectors: directory of the weights of each other learned method.
        selector_digests: their digests; part of every cache key.
        cell_cache_gib: GiB in which a worker keeps the vision tower's output of temporal cells; None is 1 on a CPU and
            4 % of a GPU's memory, 0 keeps none.
    """

    retention_ratio: float = 1.0
    method: str = "score"
    allowed_methods: tuple[str, ...] = ()
    policy: str | None = None
    policy_digest: str = ""
    max_frames: int = DEFAULT_MAX_FRAMES
    max_pixels: int | None = None
    selectors: dict[str, str] = field(default_factory=dict)
    selector_digests: dict[str, str] = field(default_factory=dict)
    cell_cache_gib: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "retention_ratio", check_retention_ratio(self.retention_ratio))
        for name in ("method", "policy_digest"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"score config: {name} must be a string, got {getattr(self, name)!r}")
        if not isinstance(self.policy, str | None):
            raise ValueError(f"score config: policy must be a path or null, got {self.policy!r}")
        if not isinstance(self.allowed_methods, list | tuple) or not all(
            isinstance(name, str) for name in self.allowed_methods
        ):
            raise ValueError(f"score config: allowed_methods must be a list of names, got {self.allowed_methods!r}")
        object.__setattr__(self, "allowed_methods", tuple(self.allowed_methods))
        for name, least in (("max_frames", 1), ("max_pixels", MIN_PIXELS)):
            value = getattr(self, name)
            if name == "max_pixels" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"score config: {name} must be an integer >= {least}, got {value!r}")
        if self.cell_cache_gib is not None:
            object.__setattr__(self, "cell_cache_gib", check_cell_cache_gib(self.cell_cache_gib))
        for name in ("selectors", "selector_digests"):
            given = getattr(self, name)
            if not isinstance(given, dict) or not all(isinstance(v, str) for pair in given.items() for v in pair):
                raise ValueError(f"score config: {name} must map methods to strings, got {given!r}")
        if "score" in self.methods and not self.policy:
            raise ValueError("score config: method 'score' needs policy, the directory of a trained retention policy")

    @property
    def reuses_cells(self) -> bool:
        """Whether a cell that is known is not encoded again."""
        return self.cell_cache_gib != 0

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that this server runs, the default first."""
        return (self.method, *(name for name in self.allowed_methods if name != self.method))

    def to_overrides(self) -> dict[str, Any]:
        """The value for vLLM's ``hf_overrides``."""
        return {HF_CONFIG_KEY: asdict(self)}

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> ServingConfig | None:
        """Read it back; None where compression is not configured, so that the plug-in stays inert.

        Raises:
            ValueError: unknown keys or values out of range; the message names the key.
        """
        raw = getattr(hf_config, HF_CONFIG_KEY, None)
        if raw is None:
            return None
        if not isinstance(raw, dict):
            raise ValueError(f"score config must be an object, got {raw!r}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"score config has unknown keys {unknown}; known keys are {sorted(known)}")
        return cls(**raw)

    def cache_key(self, retention_ratio: float, method: str) -> str:
        """What makes two compressions of the same pixels differ; 1 and 1.0 give the same key.

        K is a function of this ratio and of the grid, which the pixels and the processor's options determine.
        """
        digest = self.policy_digest if method == "score" else self.selector_digests.get(method, "")
        return f"{method}:{digest}:{float(retention_ratio)!r}"
