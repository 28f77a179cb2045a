"""The training loop: stages in order, a step over all processes, checkpoints, and the policy at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from score_vllm.train import checkpoint
from score_vllm.train.config import StageSettings, TrainSettings, differences
from score_vllm.train.curriculum import StageData
from score_vllm.train.data.sample import SampleSource
from score_vllm.train.frozen.feature_cache import FeatureCache
from score_vllm.train.frozen.model import Engine
from score_vllm.train.initial_policy import StandardisedPolicy, make_policy
from score_vllm.train.objective.rollout import noise_generator
from score_vllm.train.optimizer import learning_rate_factor, make_optimizer
from score_vllm.train.provenance import provenance
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.step import METRICS, sample_step
from score_vllm.train.stopping import CollapseWatch, StopSignal, TrainingStoppedError
from score_vllm.train.tracking import LOG_NAME, RunLog, start_trackers

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one configuration.

    Samples are spread over the processes of ``accelerator``; the policy's gradients are summed in float64, so that
    the result does not depend on how they are spread. Only the first process writes.

    Args:
        settings: of the run.
        engine: the frozen model.
        accelerator: an ``accelerate.Accelerator``.
        sources: samples of every stage that is run, by its name.

    Raises:
        ConfigurationError: ``policy.init`` names nothing, or is for another model.
    """

    def __init__(
        self, settings: TrainSettings, engine: Engine, accelerator: Any, sources: Mapping[str, SampleSource]
    ) -> None:
        self.settings, self.engine, self.accelerator = settings, engine, accelerator
        self._sources = sources
        self.output = Path(settings.output)
        self.policy = make_policy(settings, engine.hidden_size, engine.architecture).to(accelerator.device).train()
        self._names = [name for name, _ in self.policy.named_parameters()]
        self.local_samples = settings.optimizer.samples_per_step
        self.samples_per_step = self.local_samples * accelerator.num_processes
        self.step = 0
        self._optimizer = make_optimizer(settings.optimizer, self.policy)
        self._collapse = CollapseWatch(settings.collapse_patience)
        directory = Path(settings.cache.directory) if settings.cache.directory else self.output / "features"
        self._cache = FeatureCache(settings.cache, engine.identity, directory)
        self._problem = ""

    def run(self, *, only: str = "", resume: bool = False) -> int:
        """Train.

        Args:
            only: name of the one stage to run; empty runs all.
            resume: go on from the newest checkpoint in the output folder; from the start where there is none.

        Returns:
            0 at the end, 128 + the signal's number where one stopped it (the state is saved).

        Raises:
            TrainingStoppedError: numbers are not finite, or the policy has collapsed.
            ConfigurationError: the output holds a run and ``resume`` is False, or it cannot be resumed with
                these settings.
        """
        stages = (self.settings.named(only),) if only else self.settings.stages
        found = self._restore(resume)
        if found is None and isinstance(self.policy, StandardisedPolicy):
            self._standardise(self.policy, stages[0])
        main = self.accelerator.is_main_process
        log = RunLog(self.output / LOG_NAME, resumed_at=self.step if found else -1) if main else None
        if main:
            start_trackers(self.accelerator, self.settings.tracking, self.settings.to_dict())
            facts = provenance(self.settings, steps=self.step, processes=self.accelerator.num_processes)
            log.write("resumed" if found else "started", self.step, **facts)  # type: ignore[union-attr]
        plan = list(self._plan(stages, found))
        total = self.step + sum(stage.steps - first for stage, first in plan)
        bar = tqdm(total=total, initial=self.step, disable=not (main and self.settings.tracking.progress), unit="step")
        try:
            with StopSignal() as signal, bar:
                for stage, first in plan:
                    if not self._run_stage(stage, first, signal, log, bar):
                        return 128 + (signal.received or 15)
            if main:
                facts = provenance(self.settings, steps=self.step, processes=self.accelerator.num_processes)
                self.policy.save_pretrained(self.output / "policy", **facts)
                log.write("finished", self.step)  # type: ignore[union-attr]
            return 0
        except TrainingStoppedError as error:
            if log:
                log.write("failed", self.step, diagnosis=str(error))
            raise
        finally:
            if log:
                log.close()

    def _standardise(self, policy: StandardisedPolicy, stage: StageSettings) -> None:
        """Every process measures the same samples."""
        data = StageData(self._sources[stage.name], stage, self.settings.seed, self.engine, self._cache)
        slots = range(min(self.settings.policy.standardise, len(self._sources[stage.name])))
        try:
            policy.measure(data.prepare(slot, slots[slot + 1 :]).encoded.x for slot in slots)
        finally:
            data.close()

    def _plan(
        self, stages: tuple[StageSettings, ...], found: checkpoint.TrainState | None
    ) -> Iterator[tuple[StageSettings, int]]:
        """Stages still to run, each with its first step."""
        order = [stage.name for stage in self.settings.stages]
        for stage in stages:
            if found is None or order.index(stage.name) > order.index(found.stage):
                yield stage, 0
            elif stage.name == found.stage and found.stage_step < stage.steps:
                yield stage, found.stage_step

    def _restore(self, resume: bool) -> checkpoint.TrainState | None:
        root = self.output / "checkpoints"
        if not resume:
            if checkpoint.checkpoints(root):
                raise ConfigurationError(
                    f"output {str(self.output)!r} holds checkpoints: add --resume, or choose another output"
                )
            return None
        if self.accelerator.is_main_process:
            checkpoint.clear_leftovers(root)
        loaded = checkpoint.newest_checkpoint(root)
        step = loaded[2].step if loaded else -1
        seen = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(seen)) > 1:
            raise ConfigurationError(
                f"processes see different checkpoints (steps {seen}): output must be on a shared disk"
            )
        if loaded is None:
            logger.warning("nothing to resume in %s: starting anew", root)
            return None
        weights, optimizer, state = loaded
        if changed := differences(state.settings, self.settings.to_dict()):
            raise ConfigurationError(
                f"the run was started with other values of {changed}; it can only be resumed with those"
            )
        if state.samples_per_step != self.samples_per_step:
            raise ConfigurationError(
                f"the run has {state.samples_per_step} samples per step over all processes, now it would have "
                f"{self.samples_per_step} (optimizer.samples_per_step * processes)"
            )
        if state.stage not in self.settings.stage:
            raise ConfigurationError(f"the run was in stage {state.stage!r}, which the configuration does not have")
        self.policy.load_state_dict(weights)
        checkpoint.restore_optimizer(self._optimizer, self._names, optimizer)
        self._collapse.streak = state.collapse_streak
        self.step = state.step
        return state

    def _run_stage(
        self, stage: StageSettings, first: int, signal: StopSignal, log: RunLog | None, bar: tqdm[Any]
    ) -> bool:
        """Run to the stage's end; False where a signal stopped it. Either way the state is saved."""
        if first == 0:
            self._optimizer = make_optimizer(self.settings.optimizer, self.policy)
        data = StageData(self._sources[stage.name], stage, self.settings.seed, self.engine, self._cache)
        bar.set_description(stage.name)
        try:
            for number in range(first, stage.steps):
                started = time.perf_counter()
                values, stop = self._step(stage, number, data, signal)
                self.step += 1
                values["tokens_per_second"] = values["tokens"] / (time.perf_counter() - started)
                self._report(stage, values, len(data.broken), log, bar)
                self._collapse.check(values, exact=self.settings.rollout.objective == "budget-matched")
                every = self.settings.checkpoint.every
                if stop or number + 1 == stage.steps or (every and self.step % every == 0):
                    self._save(stage, number + 1)
                if stop:
                    if log:
                        log.write("stopped by a signal", self.step)
                    return False
            return True
        finally:
            data.close()

    def _step(
        self, stage: StageSettings, number: int, data: StageData, signal: StopSignal
    ) -> tuple[dict[str, float], bool]:
        """One optimiser step over the samples of all processes."""
        parameters = list(self.policy.parameters())
        start = number * self.samples_per_step + self.accelerator.process_index * self.local_samples
        slots = [*range(start, start + self.local_samples)]
        upcoming = range(start + self.samples_per_step, start + self.samples_per_step + self.local_samples)
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)
        metrics = torch.zeros(len(METRICS), dtype=torch.float64)
        problems = 0
        for place, slot in enumerate(slots):
            item = data.prepare(slot, [*slots[place + 1 :], *upcoming])
            generator = noise_generator(self.settings.seed, stage.name, slot)
            result = sample_step(self.policy, self.engine, item, self.settings.rollout, stage.tau, generator)
            total += torch.cat([g.flatten() for g in result.gradients]).double()
            metrics += result.metrics
            if result.problem:
                problems += 1
                self._problem = result.problem
        self.engine.finish_step()
        flags = torch.tensor([problems, float(signal.received != 0)], dtype=torch.float64)
        # One exchange carries gradients, metrics and flags: every process takes the same decision at the same step.
        everything = self.accelerator.reduce(torch.cat([total, metrics.to(total), flags.to(total)]), "sum")
        total, metrics, flags = everything.split([total.numel(), len(METRICS), 2])
        if flags[0] > 0:
            raise TrainingStoppedError(
                f"step {self.step + 1}, stage {stage.name!r}: {self._problem or 'another process met bad numbers'}"
            )
        self._update(parameters, (total / self.samples_per_step).float(), number, stage.steps)
        values = dict(zip(METRICS, (metrics.cpu() / self.samples_per_step).tolist(), strict=True))
        values["tokens"] *= self.samples_per_step
        return values, bool(flags[1] > 0)

    def _update(self, parameters: list[torch.nn.Parameter], gradient: torch.Tensor, number: int, steps: int) -> None:
        settings = self.settings.optimizer
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        if settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(number, steps, settings)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _report(
        self, stage: StageSettings, values: dict[str, float], broken: int, log: RunLog | None, bar: tqdm[Any]
    ) -> None:
        bar.update()
        if log is None or self.step % self.settings.tracking.log_every:
            return
        rate = self._optimizer.param_groups[0]["lr"]
        log.write("step", self.step, stage=stage.name, lr=rate, broken_samples=broken, **values)
        self.accelerator.log({f"train/{k}": v for k, v in {**values, "lr": rate}.items()}, step=self.step)
        bar.set_postfix({k: f"{values[k]:.3f}" for k in ("reward", "ce_gap", "sparsity", "safe_share")}, refresh=False)

    def _save(self, stage: StageSettings, stage_step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        state = checkpoint.TrainState(
            step=self.step,
            stage=stage.name,
            stage_step=stage_step,
            samples_per_step=self.samples_per_step,
            collapse_streak=self._collapse.streak,
            settings=self.settings.to_dict(),
            provenance=provenance(self.settings, steps=self.step, processes=self.accelerator.num_processes),
            digests={},
        )
        tensors = checkpoint.optimizer_tensors(self._optimizer, self._names)
        root = self.output / "checkpoints"
        checkpoint.save_checkpoint(root, self.policy.state_dict(), tensors, state, self.settings.checkpoint.keep)
