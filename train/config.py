"""The settings of a training run, as one tree of models; a TOML file and ``--set`` fill it.

One file: the settings read as one tree.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from score_vllm.near_miss import near_miss
from score_vllm.train.data.config import SourceConfig
from score_vllm.train.schema import ConfigurationError, Settings, assign, build, parse_override, read_toml

# Written for a run on own clips, and read by its sources of these kinds.
OWN_FILES = {"jsonl": "clips.jsonl", "stills": "stills.jsonl"}
OWN_HELD_OUT = "held_out.jsonl"


class ModelSettings(Settings):
    """The frozen model.

    Attributes:
        path: directory or hub id of a Qwen2.5-VL; ``demo`` is the embedded one.
        dtype: of tower and language model.
        device: ``auto`` is a GPU where there is one (each process its own), else the CPU.
        shard: ``fsdp`` spreads the language model's layers over the processes; ``none`` gives each a copy. Sharding
            was run on CPU processes only, never on GPUs.
    """

    path: str = "demo"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    shard: Literal["none", "fsdp"] = "none"


class PolicySettings(Settings):
    """The policy that is trained.

    Attributes:
        width: H of its hidden layer; 0 is the default for the model's size.
        use_residual: False is the paper's ablation without the surprise signal.
        initial_keep_probability: p of every token at the start (not in the paper).
        init: directory of a policy to start from; empty for fresh weights.
        standardise: samples whose tokens give the mean and scale per channel in which a fresh policy learns (not in the
            paper); folded into its weights when it is saved. 0: none.
        ranked_share: share of a video's tokens that the policy chooses; the rest of a budget is spread evenly, in
            serving and in the rollouts of ``budget-matched`` (not in the paper). 1: it chooses all.
    """

    width: int = Field(default=0, ge=0, le=65536)
    use_residual: bool = True
    initial_keep_probability: float = Field(default=0.5, ge=0.01, le=0.99)
    init: str = ""
    standardise: int = Field(default=0, ge=0, le=4096)
    ranked_share: float = Field(default=1.0, gt=0, le=1)


class RolloutSettings(Settings):
    """How groups are drawn and run.

    Attributes:
        objective: ``paper`` (Bernoulli masks, eq. 5-9), or ``budget-matched`` (exact-k subsets at serving's ratios).
        group_size: K rollouts per video.
        max_rollout_tokens: most tokens, padding included, that run through the language model at once.
        ratio_min, ratio_max: range of the ratios of ``budget-matched``, drawn log-uniformly.
    """

    objective: Literal["paper", "budget-matched"] = "paper"
    group_size: int = Field(default=16, ge=2, le=4096)
    max_rollout_tokens: int = Field(default=8192, ge=1)
    ratio_min: float = Field(default=0.06, gt=0, le=1)
    ratio_max: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min must be <= ratio_max = {self.ratio_max!r}, got {self.ratio_min!r}")
        return self


class OptimizerSettings(Settings):
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

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=0.003, gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, le=0.9999)
    beta1: float = Field(default=0.9, ge=0, le=0.9999)
    beta2: float = Field(default=0.99, ge=0, le=0.99999)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    grad_clip: float = Field(default=1.0, ge=0)
    samples_per_step: int = Field(default=1, ge=1, le=4096)


class CheckpointSettings(Settings):
    """When state is saved.

    Attributes:
        every: steps between checkpoints; 0 saves at the end of stages and on SIGTERM alone.
        keep: newest checkpoints that are kept.
    """

    every: int = Field(default=100, ge=0)
    keep: int = Field(default=3, ge=1, le=1000)


class CacheSettings(Settings):
    """Where visual tokens are kept between epochs. The bound is per process in memory, shared on disk.

    Attributes:
        kind: ``memory``, ``disk`` or ``none``.
        max_gib: most that is kept; what was used longest ago goes first.
        directory: of ``disk``; empty is ``<output>/features``.
    """

    kind: Literal["memory", "disk", "none"] = "memory"
    max_gib: float = Field(default=2.0, gt=0)
    directory: str = ""


class TrackingSettings(Settings):
    """Experiment trackers; ``<output>/log.jsonl`` is always written.

    Attributes:
        tracker: ``tensorboard``, ``wandb`` or ``none``, through accelerate.
        project: name of the run's project.
        log_every: steps between lines.
        progress: a progress bar on standard error.
    """

    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    project: str = "score-train"
    log_every: int = Field(default=1, ge=1)
    progress: bool = True


class ReportSettings(Settings):
    """``<output>/report.html``, written at the end of a run.

    Attributes:
        clips: on which the policy is measured beside the baselines, each about as dear as one to two of training's
            videos; 0 draws the curves alone.
        pictures: clips of these whose kept tokens are drawn.
        questions: asked about each, where the source has some.
    """

    clips: int = Field(default=12, ge=0, le=4096)
    pictures: int = Field(default=3, ge=0, le=64)
    questions: int = Field(default=4, ge=0, le=64)


class CaptionSettings(Settings):
    """How the frozen model describes the videos of ``clips``.

    Attributes:
        prompt: asked about each clip, in captioning and in training.
        still_prompt: asked about single frames, whose descriptions are the warm-up's targets.
        max_tokens: longest description.
        stills: frames of each clip that are described for the warm-up.
    """

    prompt: str = Field(default="Describe this video in detail.", min_length=1)
    still_prompt: str = Field(default="Describe this picture in detail.", min_length=1)
    max_tokens: int = Field(default=192, ge=8, le=4096)
    stills: int = Field(default=3, ge=1, le=64)


class StageSettings(Settings):
    """One stage of the curriculum (paper section 4.4).

    Attributes:
        steps: optimiser steps.
        tau: tolerance of eq. 5; 1.01 in the paper's warm-up, 1.02 after it.
        min_frames, max_frames: a sample with fewer or more is skipped, counted and named.
        sources: what is read, mixed by weight.
        allow_short_targets: train although the median target has fewer than 8 tokens (see ``--check``).
        name: key of its table.
    """

    steps: int = Field(default=1000, ge=1)
    tau: float = Field(default=1.02, ge=1, le=10)
    min_frames: int = Field(default=1, ge=1)
    max_frames: int = Field(default=128, ge=1, le=65536)
    sources: tuple[SourceConfig, ...] = Field(strict=False, min_length=1)
    allow_short_targets: bool = False
    name: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames must be <= max_frames = {self.max_frames}, got {self.min_frames}")
        return self


class TrainSettings(Settings):
    """A whole run.

    Attributes:
        output: folder of ``checkpoints/``, ``policy/``, ``log.jsonl`` and ``report.html``.
        clips: folder of videos to train on, described by the frozen model itself; empty: sources bring their texts.
        seed: of weights, data order and rollouts.
        collapse_patience: steps in a row that look collapsed before the run stops, see
            :class:`~score_vllm.train.stopping.CollapseWatch`; 0 never stops.
        stage: its tables by name, in the order of the file; each runs after the one before.
    """

    output: str
    clips: str = ""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    collapse_patience: int = Field(default=20, ge=0)
    model: ModelSettings = ModelSettings()
    policy: PolicySettings = PolicySettings()
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    cache: CacheSettings = CacheSettings()
    tracking: TrackingSettings = TrackingSettings()
    report: ReportSettings = ReportSettings()
    captions: CaptionSettings = CaptionSettings()
    stage: dict[str, StageSettings]

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if not self.output.strip():
            raise ValueError("output must name the folder of this run, got an empty string")
        if not self.stage:
            raise ValueError("stage must hold at least one stage: a table [stage.NAME]")
        if self.clips and self.model.shard != "none":
            raise ValueError(f"clips can only be described by a whole model: model.shard = {self.model.shard!r}")
        return self

    @property
    def described(self) -> Path:
        """Folder of the descriptions of ``clips``."""
        return Path(self.output) / "captions"

    @property
    def stages(self) -> tuple[StageSettings, ...]:
        """In order."""
        return tuple(self.stage.values())

    def named(self, name: str) -> StageSettings:
        """The stage of that name.

        Raises:
            ValueError: there is none; the message lists them.
        """
        if name not in self.stage:
            raise ConfigurationError(
                f"stage must be one of {list(self.stage)}, got {name!r}{near_miss(name, self.stage)}"
            )
        return self.stage[name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Hex digest of everything that shapes the result: see :func:`differences` for what does not."""
        return hashlib.sha256(json.dumps(_shaping(self.to_dict()), sort_keys=True).encode()).hexdigest()[:16]


# A run may be resumed with other values of these; samples per step are compared over all processes.
_FREE = ("output", "checkpoint", "cache", "tracking", "report", "collapse_patience")


def _shaping(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    kept = {name: copy.deepcopy(value) for name, value in plain.items() if name not in _FREE}
    for table, name in (("model", "device"), ("model", "shard"), ("optimizer", "samples_per_step")):
        kept[table].pop(name, None)
    kept["rollout"].pop("max_rollout_tokens", None)
    # A falling rate depends on where it falls to.
    free = ("name", "allow_short_targets", *(() if kept["optimizer"]["schedule"] == "cosine" else ("steps",)))
    kept["stage"] = {name: {k: v for k, v in stage.items() if k not in free} for name, stage in kept["stage"].items()}
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
        raise ConfigurationError("stage must hold tables [stage.NAME], one per stage")
    for text in overrides:
        steps, value = parse_override(text)
        if steps[0] == "stage" and len(steps) > 1 and steps[1] not in stages:
            known = StageSettings.model_fields
            if steps[1] not in known or not stages:
                raise ConfigurationError(
                    f"--set {text}: stage must be one of {sorted(stages)}, or a field {sorted(known)}"
                )
            for name in stages:
                assign(stages[name], steps[1:], copy.deepcopy(value))
        else:
            assign(table, steps, value)
    if table.get("clips") == "":
        raise ConfigurationError("clips must name the folder of your videos, got '': --set clips=FOLDER")
    for name, stage in stages.items():
        if "name" in stage:
            raise ConfigurationError(f"unknown key 'stage.{name}.name': the table's own name is the stage's")
        stage["name"] = name
        for source in stage.get("sources", []) if table.get("clips") else []:
            # Sources of a run on own clips read what that run itself wrote.
            if isinstance(source, dict) and (file := OWN_FILES.get(source.get("kind", ""))):
                source.setdefault("path", str(Path(table.get("output", "")) / "captions" / file))
    settings: TrainSettings = build(TrainSettings, table)
    return settings
