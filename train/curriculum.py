"""The data of a stage: which sample stands at which position, read ahead in a thread, broken ones passed over.

A *slot* numbers the samples of a stage over all processes: step s with B samples (all processes together) uses
the slots s * B ... s * B + B - 1. The content of a slot depends on seed, stage and slot alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from score_vllm.train.config import StageSettings
from score_vllm.train.data.config import FileConfig
from score_vllm.train.data.sample import BrokenSampleError, SampleSource, TrainingSample
from score_vllm.train.data.sources import open_source
from score_vllm.train.frozen.feature_cache import CachedSample, FeatureCache
from score_vllm.train.frozen.model import Engine
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.stopping import TrainingStoppedError

logger = logging.getLogger(__name__)

# Samples tried for one slot before the run stops: a source that is broken throughout must not look like progress.
MAX_ATTEMPTS = 50


def open_sources(stage: StageSettings, merge: int) -> list[SampleSource]:
    """The sources of a stage, each by itself.

    Args:
        stage: its settings.
        merge: frames per temporal cell of the model.

    Raises:
        ConfigurationError: as :func:`~score_vllm.train.data.sources.open_source`, with the stage named.
    """
    try:
        return [open_source(spec, merge) for spec in stage.sources]
    except ConfigurationError as error:
        raise type(error)(f"stage.{stage.name}.sources: {error}") from error


class StageData:
    """Samples of one stage by slot, encoded and with their base cross-entropy.

    Every epoch walks through the whole source in an order of its own. A broken sample's slot is given to the
    ones that follow it in that order.

    Args:
        source: of the samples.
        stage: its settings.
        seed: of the run.
        engine: encodes.
        cache: of what the engine made.
        read_ahead: slots decoded before they are asked for.
    """

    def __init__(
        self,
        source: SampleSource,
        stage: StageSettings,
        seed: int,
        engine: Engine,
        cache: FeatureCache,
        read_ahead: int = 2,
    ) -> None:
        self._source, self._stage, self._engine, self._cache = source, stage, engine, cache
        self._seed = _number(f"{seed}:{stage.name}")
        self._namespace = _describe(stage, seed)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._read_ahead = read_ahead
        self._ahead: dict[int, Future[TrainingSample]] = {}
        # One thread: sources need not be safe for several.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="samples")
        self.broken: dict[int, str] = {}

    def index(self, slot: int, attempt: int = 0) -> int:
        """Index in the source of a slot's sample; of the ``attempt``-th after it where that is broken."""
        size = len(self._source)
        epoch, place = divmod(slot, size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(size)
            self._epoch = epoch
        return int(self._order[(place + attempt) % size])

    def prepare(self, slot: int, following: Sequence[int] = ()) -> CachedSample:
        """The sample of a slot.

        Args:
            slot: its number.
            following: slots that this process will ask for next; they are read ahead.

        Raises:
            TrainingStoppedError: too many samples in a row are broken; the message has the last reason.
        """
        reason = ""
        for attempt in range(min(MAX_ATTEMPTS, len(self._source))):
            index = self.index(slot, attempt)
            if index in self.broken:
                reason = self.broken[index]
                continue
            key = f"{self._namespace}:{index}"
            found = self._cache.get(key)
            if found is None:
                pending = self._ahead.pop(index, None) or self._reader.submit(self._source.__getitem__, index)
                self._look_ahead(slot, following)
                try:
                    found = self._encode(pending.result())
                except BrokenSampleError as error:
                    reason = self.broken[index] = str(error)
                    logger.warning("skipped a broken sample (%d so far): %s", len(self.broken), reason)
                    continue
                self._cache.put(key, found)
            return found
        raise TrainingStoppedError(
            f"stage {self._stage.name!r}: {min(MAX_ATTEMPTS, len(self._source))} samples in a row are broken; "
            f"the last: {reason}"
        )

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _encode(self, sample: TrainingSample) -> CachedSample:
        count, stage = sample.frames.shape[0], self._stage
        if not stage.min_frames <= count <= stage.max_frames:
            raise BrokenSampleError(
                f"{sample.key}: {count} frames, stage.{stage.name} takes {stage.min_frames} to {stage.max_frames}"
            )
        encoded = self._engine.encode(sample)
        # Alone, not beside rollouts: the same value to the last bit whenever it is computed.
        ce = float(self._engine.cross_entropy(encoded, [torch.arange(encoded.num_tokens)])[0])
        return CachedSample(encoded, ce)

    def _look_ahead(self, slot: int, following: Sequence[int]) -> None:
        size = len(self._source)
        # Within the epoch: beyond its end another order holds.
        same_epoch = [n for n in following[: self._read_ahead] if n // size == slot // size]
        wanted = {self.index(n) for n in same_epoch}
        for stale in self._ahead.keys() - wanted:
            self._ahead.pop(stale).cancel()
        for index in sorted(wanted - self._ahead.keys() - self.broken.keys()):
            if f"{self._namespace}:{index}" not in self._cache:
                self._ahead[index] = self._reader.submit(self._source.__getitem__, index)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _describe(stage: StageSettings, seed: int) -> str:
    """What a stage's samples depend on: their sources, with size and time of the data files, and the seed that mixes
    several."""
    stamps = []
    for source in stage.sources:
        path = Path(source.path) if isinstance(source, FileConfig) else None
        stat = path.stat() if path is not None and path.exists() else None
        stamps.append([stat.st_size, stat.st_mtime_ns] if stat else None)
    text = json.dumps(
        [[s.model_dump(mode="json") for s in stage.sources], stamps, seed if len(stage.sources) > 1 else 0],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
