"""Before a run on own clips: how long it will take, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from score_vllm.policy import RetentionPolicy
from score_vllm.train.config import TrainSettings
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen.captioner import describe
from score_vllm.train.frozen.feature_cache import CachedSample
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.objective.rollout import noise_generator
from score_vllm.train.own_clips import ClipDescriber
from score_vllm.train.step import sample_step

# A warm-up clip has 2 to 4 stills of 3 to 6 frames.
_WARMUP_FRAMES = 13.5


def estimate(settings: TrainSettings, describer: ClipDescriber, paths: list[Path], processes: int) -> Iterator[str]:
    """Time and memory of the whole run, from one clip: it is described, and a group of rollouts is run on it.

    Yields:
        Lines to print.
    """
    engine, ask = describer.engine, settings.captions
    for path in paths:
        try:
            started = time.perf_counter()
            clip = describer.reader.read(path, path.name)
            encoded = engine.encode(TrainingSample(path.name, clip.frames, clip.fps, ask.prompt, "-"))
            text = describe(engine, encoded, ask.max_tokens)
            to_describe = time.perf_counter() - started
            encoded = engine.encode(TrainingSample(path.name, clip.frames, clip.fps, ask.prompt, text))
        except BrokenSampleError:
            continue
        break
    else:
        return
    policy = RetentionPolicy(engine.hidden_size, settings.policy.width or None).to(engine.device)
    started = time.perf_counter()
    base = float(engine.cross_entropy(encoded, [torch.arange(encoded.num_tokens)])[0])
    item, noise = CachedSample(encoded, base), noise_generator(0, "estimate", 0)
    sample_step(policy, engine, item, settings.rollout, settings.stages[-1].tau, noise)
    to_step = time.perf_counter() - started
    per_step = settings.optimizer.samples_per_step * to_step
    asked = describer.missing(paths) * (1 + ask.stills * 0.5) * to_describe / processes
    yield (
        f"estimate from {path.name} ({len(clip.frames)} frames, {encoded.num_tokens} tokens): {to_describe:.1f} s to "
        f"describe, {to_step:.1f} s for its {settings.rollout.group_size} rollouts"
    )
    parts = [f"descriptions {_duration(asked)}"]
    for stage in settings.stages:
        share = min(1.0, _WARMUP_FRAMES / len(clip.frames)) if stage.sources[0].kind == "stills" else 1.0
        parts.append(f"{stage.name} {_duration(stage.steps * per_step * share)}")
    yield f"         {', '.join(parts)}; {memory(engine, policy)}"
    cached = (
        f" and up to {settings.cache.max_gib:g} GiB of features in memory" if settings.cache.kind == "memory" else ""
    )
    yield f"         more where clips are longer than this one{cached}"


def memory(engine: FrozenVLM, policy: RetentionPolicy) -> str:
    """Peak so far, with the optimiser's state that is still to come."""
    coming = 3 * 4 * sum(p.numel() for p in policy.parameters())
    if engine.device.type == "cuda":
        total = torch.cuda.get_device_properties(engine.device).total_memory
        peak = torch.cuda.max_memory_allocated(engine.device) + coming
        return f"{peak / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + coming
    return f"{peak / 2**30:.1f} GiB of memory"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
