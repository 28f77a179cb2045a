"""``python -m score_vllm.train --config FILE``: train a retention policy, or check that it could be."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from score_vllm.train.config import TrainSettings, load_settings
from score_vllm.train.curriculum import open_stage
from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.stopping import TrainingStoppedError
from score_vllm.train.tracking import check_tracker
from score_vllm.train.trainer import Trainer, make_policy


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m score_vllm.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file; see train/configs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="overrides",
        help="override one entry by its dotted name: optimizer.lr=0.01, stage.steps=10, stage.main.tau=1.02",
    )
    parser.add_argument("--stage", default="", metavar="NAME", help="run this stage alone")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument(
        "--check", action="store_true", help="check configuration, model and data, print the plan, stop"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the return value is the exit status.

    Returns:
        0 done; 1 training stopped itself; 2 wrong configuration, model or data; 128 + n stopped by signal n, saved.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings(options.config, options.overrides)
        if options.stage:
            settings.named(options.stage)
        check_tracker(settings.tracking)
        if options.check:
            check(settings)
            return 0
        accelerator = make_accelerator(settings)
        trainer = Trainer(settings, make_engine(settings, accelerator), accelerator)
        return trainer.run(only=options.stage, resume=options.resume)
    except TrainingStoppedError as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError, ModuleNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def model_path(settings: TrainSettings) -> str:
    """Directory or hub id; ``demo`` is the embedded model, which is built at first use."""
    if settings.model.path != "demo":
        return settings.model.path
    from score_vllm.demo import demo_model

    return str(demo_model())


def make_accelerator(settings: TrainSettings) -> Any:
    """Processes and devices as ``torchrun`` or ``accelerate launch`` gave them."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    tracker = settings.tracking.tracker
    return Accelerator(
        cpu=settings.model.device == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=settings.output, logging_dir=f"{settings.output}/trackers"),
    )


def make_engine(settings: TrainSettings, accelerator: Any) -> FrozenVLM:
    """The frozen model on this process's device."""
    import torch

    return FrozenVLM.from_pretrained(
        model_path(settings),
        getattr(torch, settings.model.dtype),
        accelerator.device,
        max_rollout_tokens=settings.rollout.max_rollout_tokens,
        shard=settings.model.shard == "fsdp",
    )


def check(settings: TrainSettings) -> None:
    """Open everything that training would, load one sample per stage, and print the plan.

    Raises:
        FileNotFoundError, ValueError: as training would; a first sample that is broken is only reported.
    """
    config = FrozenVLM.config_of(model_path(settings))
    policy = make_policy(settings, config.get_text_config().hidden_size)
    weights = sum(p.numel() for p in policy.parameters())
    print(f"model    {settings.model.path} ({config.model_type}, {settings.model.dtype})")
    print(f"policy   {policy.config.hidden_size} -> {policy.config.policy_width} -> 1, {weights} weights")
    rollout, optimizer = settings.rollout, settings.optimizer
    print(f"rollouts {rollout.group_size} per video, {rollout.objective}, {rollout.max_rollout_tokens} tokens at once")
    print(f"update   {optimizer.name}, lr {optimizer.lr}, {optimizer.samples_per_step} videos per process and step")
    for stage in settings.stages:
        source = open_stage(stage, settings.seed)
        kinds = ", ".join(s.kind for s in stage.sources)
        print(f"stage    {stage.name}: {stage.steps} steps, tau {stage.tau}, {len(source)} samples of {kinds}")
        try:
            first = source[0]
        except BrokenSampleError as error:
            print(f"         first sample is broken: {error}")
            continue
        print(f"         first sample {first.key}: frames {first.frames.shape}, {first.fps:g} fps")
        print(f"         asked {first.prompt[:100]!r}, answer {first.target[:100]!r}")
    print(f"output   {settings.output} (configuration {settings.digest()})")


if __name__ == "__main__":
    sys.exit(main())
