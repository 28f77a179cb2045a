"""Everything a training run can be told, as one tree of dataclasses; a TOML file and ``--set`` fill it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from score_vllm.train.data.config import SourceConfig
from score_vllm.train.objective.rollout import OBJECTIVES
from score_vllm.train.schema import assign, bounded, build, choice, parse_override, read_toml

SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSettings:
    """The frozen model.

    Attributes:
        path: directory or hub id of a Qwen2.5-VL; ``demo`` is the embedded one.
        dtype: of tower and language model.
        device: ``auto`` is a GPU where there is one (each process its own), else the CPU.
        shard: ``fsdp`` spreads the language model's layers over the processes; ``none`` gives each a copy. Sharding
            was run on CPU processes only, never on GPUs.
    """

    path: str = "demo"
    dtype: str = choice("float32", DTYPES)
    device: str = choice("auto", ("auto", "cpu"))
    shard: str = choice("none", ("none", "fsdp"))


@dataclass(frozen=True)
class PolicySettings:
    """The policy that is trained.

    Attributes:
        width: H of its hidden layer; 0 is the default for the model's size.
        use_residual: False is the paper's ablation without the surprise signal.
        initial_keep_probability: p of every token at the start (not in the paper).
        init: directory of a policy to start from; empty for fresh weights.
    """

    width: int = bounded(0, 0, 65536)
    use_residual: bool = True
    initial_keep_probability: float = bounded(0.5, 0.01, 0.99)
    init: str = ""


@dataclass(frozen=True)
class RolloutSettings:
    """How groups are drawn and run.

    Attributes:
        objective: ``paper`` (Bernoulli masks, eq. 5-9), or ``budget-matched`` (exact-k subsets at serving's ratios).
        group_size: K rollouts per video.
        max_rollout_tokens: most tokens, padding included, that run through the language model at once.
        ratio_min, ratio_max: range of the ratios of ``budget-matched``, drawn log-uniformly.
    """

    objective: str = choice("paper", OBJECTIVES)
    group_size: int = bounded(16, 2, 4096)
    max_rollout_tokens: int = bounded(8192, 1)
    ratio_min: float = bounded(0.06, 0, 1, above=True)
    ratio_max: float = bounded(0.5, 0, 1, above=True)

    def __post_init__(self) -> None:
        if self.ratio_min > self.ratio_max:
            raise ValueError(
                f"rollout.ratio_min must be <= rollout.ratio_max = {self.ratio_max!r}, got {self.ratio_min!r}"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """How the policy's weights move. A stage starts its optimiser afresh.

    Attributes:
        name: ``adamw`` or ``sgd``; the paper names none.
        lr: learning rate after the warm-up.
        momentum: of ``sgd``.
        beta1, beta2: of ``adamw``.
        weight_decay: decoupled for ``adamw``, added to the gradient for ``sgd``.
        schedule: of each stage after its warm-up: ``constant``, or ``cosine`` down to a twentieth (not in the paper).
        warmup_steps: of each stage, over which the rate rises linearly.
        grad_clip: largest L2 norm of the gradient; 0 is no limit.
        samples_per_step: videos per process whose gradients are accumulated before a step.
    """

    name: str = choice("adamw", ("adamw", "sgd"))
    lr: float = bounded(0.003, 0, 10, above=True)
    momentum: float = bounded(0.9, 0, 0.9999)
    beta1: float = bounded(0.9, 0, 0.9999)
    beta2: float = bounded(0.99, 0, 0.99999)
    weight_decay: float = bounded(0.0, 0, 1)
    schedule: str = choice("constant", SCHEDULES)
    warmup_steps: int = bounded(0, 0)
    grad_clip: float = bounded(1.0, 0)
    samples_per_step: int = bounded(1, 1, 4096)


@dataclass(frozen=True)
class CheckpointSettings:
    """When state is saved.

    Attributes:
        every: steps between checkpoints; 0 saves at the end of stages and on SIGTERM alone.
        keep: newest checkpoints that are kept.
    """

    every: int = bounded(100, 0)
    keep: int = bounded(3, 1, 1000)


@dataclass(frozen=True)
class CacheSettings:
    """Where visual tokens are kept between epochs. The bound is per process in memory, shared on disk.

    Attributes:
        kind: ``memory``, ``disk`` or ``none``.
        max_gib: most that is kept; what was used longest ago goes first.
        directory: of ``disk``; empty is ``<output>/features``.
    """

    kind: str = choice("memory", ("memory", "disk", "none"))
    max_gib: float = bounded(2.0, 0, above=True)
    directory: str = ""


@dataclass(frozen=True)
class TrackingSettings:
    """Who is told; ``<output>/log.jsonl`` always is.

    Attributes:
        tracker: ``tensorboard``, ``wandb`` or ``none``, through accelerate.
        project: name of the run's project.
        log_every: steps between lines.
        progress: a progress bar on standard error.
    """

    tracker: str = choice("tensorboard", ("tensorboard", "wandb", "none"))
    project: str = "score-train"
    log_every: int = bounded(1, 1)
    progress: bool = True


@dataclass(frozen=True)
class StageSettings:
    """One stage of the curriculum (paper section 4.4).

    Attributes:
        steps: optimiser steps.
        tau: tolerance of eq. 5; 1.01 in the paper's warm-up, 1.02 after it.
        min_frames, max_frames: a sample with fewer or more is skipped, counted and named.
        sources: what is read, mixed by weight.
        name: key of its table.
    """

    steps: int = bounded(1000, 1)
    tau: float = bounded(1.02, 1, 10)
    min_frames: int = bounded(1, 1)
    max_frames: int = bounded(128, 1, 65536)
    sources: tuple[SourceConfig, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class TrainSettings:
    """A whole run.

    Attributes:
        output: folder of ``checkpoints/``, ``policy/`` and ``log.jsonl``.
        seed: of weights, data order and rollouts.
        collapse_patience: steps in a row that keep everything or nothing before the run stops; 0 never stops.
        stages: in the order of the file; each runs after the one before.
    """

    output: str = ""
    seed: int = bounded(0, 0, 2**31 - 1)
    collapse_patience: int = bounded(20, 0)
    model: ModelSettings = field(default_factory=ModelSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    stages: tuple[StageSettings, ...] = ()

    def __post_init__(self) -> None:
        if not self.output.strip():
            raise ValueError("output must name the folder of this run, got an empty string")

    def stage(self, name: str) -> StageSettings:
        """The stage of that name.

        Raises:
            ValueError: there is none; the message lists them.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage must be one of {[s.name for s in self.stages]}, got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def digest(self) -> str:
        """Hex digest of everything that shapes the result: see :func:`differences` for what does not."""
        return hashlib.sha256(json.dumps(_shaping(self.to_dict()), sort_keys=True).encode()).hexdigest()[:16]


# A run may be resumed with other values of these; samples per step are compared over all processes.
_FREE = ("output", "checkpoint", "cache", "tracking", "collapse_patience")


def _shaping(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    kept = {name: copy.deepcopy(value) for name, value in plain.items() if name not in _FREE}
    for table, name in (("model", "device"), ("model", "shard"), ("optimizer", "samples_per_step")):
        kept[table].pop(name, None)
    kept["rollout"].pop("max_rollout_tokens", None)
    # A falling rate depends on where it falls to.
    free = ("name",) if kept["optimizer"]["schedule"] == "cosine" else ("steps", "name")
    kept["stages"] = {stage["name"]: {k: v for k, v in stage.items() if k not in free} for stage in kept["stages"]}
    return kept


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names of what differs between two configurations' :meth:`TrainSettings.to_dict` and shapes the result."""

    def walk(a: Any, b: Any, where: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [d for k in sorted({*a, *b}) for d in walk(a.get(k), b.get(k), f"{where}.{k}" if where else k)]
        return [] if a == b else [where]

    return walk(_shaping(old), _shaping(new), "")


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a file and apply overrides.

    Args:
        path: a TOML file; stages are its ``[stage.NAME]`` tables, sources their ``[[stage.NAME.sources]]``.
        overrides: ``dotted.name=value``. ``stage.steps=10`` sets every stage, ``stage.main.steps=10`` one,
            ``stage.main.sources.0.limit=100`` an entry of a list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key or value is wrong; the message has its name and what is allowed.
    """
    return settings_from(read_toml(path), overrides)


def settings_from(raw: dict[str, Any], overrides: Sequence[str] = ()) -> TrainSettings:
    """As :func:`load_settings`, from tables already read."""
    table = copy.deepcopy(raw)
    stages = table.setdefault("stage", {})
    if not isinstance(stages, dict) or not all(isinstance(v, dict) for v in stages.values()):
        raise ValueError("stage must hold tables [stage.NAME], one per stage")
    for text in overrides:
        steps, value = parse_override(text)
        if steps[0] == "stage" and len(steps) > 1 and steps[1] not in stages:
            known = StageSettings.__dataclass_fields__
            if steps[1] not in known or not stages:
                raise ValueError(f"--set {text}: stage must be one of {sorted(stages)}, or a field {sorted(known)}")
            for name in stages:
                assign(stages[name], steps[1:], copy.deepcopy(value))
        else:
            assign(table, steps, value)
    built = []
    for name, stage in table.pop("stage").items():
        where = f"stage.{name}"
        if "name" in stage:
            raise ValueError(f"unknown key '{where}.name': the table's own name is the stage's")
        built.append(build(StageSettings, {**stage, "name": name, "sources": _sources(stage, where)}, where))
        if built[-1].min_frames > built[-1].max_frames:
            raise ValueError(
                f"{where}.min_frames must be <= max_frames = {built[-1].max_frames}, got {built[-1].min_frames}"
            )
    if not built:
        raise ValueError("the configuration needs at least one stage: a table [stage.NAME]")
    if "stages" in table:
        raise ValueError("unknown key 'stages' (did you mean 'stage'?)")
    return build(TrainSettings, {**table, "stages": tuple(built)})


def _sources(stage: dict[str, Any], where: str) -> tuple[SourceConfig, ...]:
    tables = stage.get("sources")
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{where}.sources must be a non-empty list of tables [[{where}.sources]], got {tables!r}")
    found = []
    for number, table in enumerate(tables):
        try:
            found.append(SourceConfig.from_mapping(table))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}.sources.{number}: {error}") from error
    return tuple(found)
