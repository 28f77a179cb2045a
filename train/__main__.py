"""``python -m score_vllm.train --config FILE``: train a retention policy, or check that it could be."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from score_vllm.train.config import OWN_FILES, StageSettings, TrainSettings, load_settings
from score_vllm.train.curriculum import open_sources
from score_vllm.train.data.sample import BrokenSampleError, SampleSource
from score_vllm.train.data.sources import mixed
from score_vllm.train.data.targets import Targets, look_at, require_descriptions
from score_vllm.train.frozen.model import Engine, FrozenVLM
from score_vllm.train.initial_policy import make_policy
from score_vllm.train.own_clips import ClipDescriber, find_clips, prepare
from score_vllm.train.own_estimate import estimate
from score_vllm.train.report.write import write_report
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.stopping import TrainingStoppedError
from score_vllm.train.tracking import check_tracker
from score_vllm.train.trainer import Trainer
from score_vllm.train.world.reader import FootageVLM, is_reader

logger = logging.getLogger(__name__)


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

    Raises:
        Exception: whatever else goes wrong in training, so that its traceback is shown; Python's exit status is 1.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(options)
    except TrainingStoppedError as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 1
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Everything after parsing, see :func:`main`.

    Raises:
        ConfigurationError: the user's mistake, in one sentence.
        TrainingStoppedError: see :meth:`~score_vllm.train.trainer.Trainer.run`.
    """
    settings = load_settings(options.config, options.overrides)
    stages = (settings.named(options.stage),) if options.stage else settings.stages
    check_tracker(settings.tracking)
    check_output(settings.output)
    config = FrozenVLM.config_of(model_path(settings))
    accelerator = engine = None
    if settings.clips and options.check:
        print(f"clips    {len(find_clips(settings.clips))} videos in {settings.clips}")
        if not all((settings.described / name).is_file() for name in OWN_FILES.values()):
            print("         the model describes them when training starts; the sources are empty until then")
            return 0
    elif settings.clips:
        paths = find_clips(settings.clips)
        accelerator = make_accelerator(settings)
        engine = make_engine(settings, accelerator)
        describer = ClipDescriber(settings, engine, accelerator.process_index, accelerator.num_processes)
        if accelerator.is_main_process:
            print("\n".join(estimate(settings, describer, paths, accelerator.num_processes)), flush=True)
        prepare(settings, describer, paths, accelerator)
    opened = {stage.name: open_sources(stage, temporal_merge(config)) for stage in stages}
    targets = look_at_targets(settings, opened)
    if options.check:
        check(settings, config, opened, targets)
    for stage in stages:
        weights = [spec.weight for spec in stage.sources]
        require_descriptions(stage.name, targets[stage.name], weights, stage.allow_short_targets)
    if options.check:
        return 0
    accelerator = accelerator or make_accelerator(settings)
    engine = engine or make_engine(settings, accelerator)
    sources = {
        stage.name: mixed(opened[stage.name], [spec.weight for spec in stage.sources], settings.seed)
        for stage in stages
    }
    try:
        code = Trainer(settings, engine, accelerator, sources).run(only=options.stage, resume=options.resume)
        if code == 0:
            report(settings, stages[-1], engine, accelerator, temporal_merge(config))
        return code
    except TrainingStoppedError:
        report(settings, stages[-1], None, accelerator, temporal_merge(config))
        raise
    finally:
        accelerator.end_training()


def report(settings: TrainSettings, stage: StageSettings, engine: Engine | None, accelerator: Any, merge: int) -> None:
    """Write ``report.html``; all processes call this together. Whatever goes wrong in it, training is done."""
    try:
        if accelerator.is_main_process:
            print("\n".join(write_report(settings, stage, engine, merge)), flush=True)
    except Exception:
        logger.exception("the report of %s could not be written; the run itself is whole", settings.output)
    if engine is not None:
        engine.finish_step()


def check_output(output: str) -> None:
    """Before anything is loaded: whether the run can be written there. Nothing is made but a file that vanishes.

    Raises:
        ConfigurationError: it cannot.
    """
    there = next(path for path in (Path(output).absolute(), *Path(output).absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigurationError(f"output {output!r} cannot be written in {str(there)!r}: {error.strerror}") from error


def temporal_merge(config: Any) -> int:
    """Frames that the model's vision tower merges into one temporal cell."""
    return int(getattr(config.vision_config, "temporal_patch_size", 1))


def look_at_targets(settings: TrainSettings, opened: Mapping[str, Sequence[SampleSource]]) -> dict[str, list[Targets]]:
    """Lengths and examples of every source's targets, by stage."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path(settings))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return {name: [look_at(source, count, settings.seed) for source in sources] for name, sources in opened.items()}


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


def engine_class(settings: TrainSettings) -> type[FrozenVLM]:
    """The kind of engine that the model's directory is for."""
    return FootageVLM if is_reader(model_path(settings)) else FrozenVLM


def make_engine(settings: TrainSettings, accelerator: Any) -> FrozenVLM:
    """The frozen model on this process's device."""
    import torch

    return engine_class(settings).from_pretrained(
        model_path(settings),
        getattr(torch, settings.model.dtype),
        accelerator.device,
        max_rollout_tokens=settings.rollout.max_rollout_tokens,
        shard=settings.model.shard == "fsdp",
    )


def check(
    settings: TrainSettings,
    config: Any,
    opened: Mapping[str, Sequence[SampleSource]],
    targets: Mapping[str, Sequence[Targets]],
) -> None:
    """Print the plan: model, policy, and per source its size, its first sample and what its targets look like.

    Raises:
        ConfigurationError: ``policy.init`` does not fit; a first sample that is broken is only reported.
    """
    policy = make_policy(settings, *engine_class(settings).tokens_of(config))
    weights = sum(p.numel() for p in policy.parameters())
    print(f"model    {settings.model.path} ({config.model_type}, {settings.model.dtype})")
    print(f"policy   {policy.config.hidden_size} -> {policy.config.policy_width} -> 1, {weights} weights")
    rollout, optimizer = settings.rollout, settings.optimizer
    print(f"rollouts {rollout.group_size} per video, {rollout.objective}, {rollout.max_rollout_tokens} tokens at once")
    print(f"update   {optimizer.name}, lr {optimizer.lr}, {optimizer.samples_per_step} videos per process and step")
    for name, sources in opened.items():
        stage = settings.stage[name]
        print(f"stage    {name}: {stage.steps} steps, tau {stage.tau}")
        for spec, source, found in zip(stage.sources, sources, targets[name], strict=True):
            print(f"source   {spec.kind}: {len(source)} samples, weight {spec.weight:g}")
            try:
                first = source[0]
                print(f"         first sample {first.key}: frames {first.frames.shape}, {first.fps:g} fps")
            except BrokenSampleError as error:
                print(f"         first sample is broken: {error}")
            for line in found.lines():
                print(f"         {line}")
    print(f"output   {settings.output} (configuration {settings.digest()})")


if __name__ == "__main__":
    sys.exit(main())
