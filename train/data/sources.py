"""Opening training data: a description in, samples by index out."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence

import numpy as np

from score_vllm.train.data.config import (
    CompositeConfig,
    KoalaConfig,
    LlavaVideoConfig,
    OneVisionConfig,
    SourceConfig,
    StillsConfig,
    WorldConfig,
    source_config,
)
from score_vllm.train.data.pseudo import MERGE
from score_vllm.train.data.sample import AskingSource, BrokenSampleError, SampleSource, TrainingSample
from score_vllm.train.data.stills import StillsSource
from score_vllm.train.schema import ConfigurationError, MissingError

__all__ = ["MixedSource", "mixed", "open_source", "source_config"]

# Positions after which the pattern of a mixture repeats; shares are multiples of 1 / _PERIOD.
_PERIOD = 1000


def open_source(spec: SourceConfig, merge: int = MERGE) -> SampleSource:
    """Open one source.

    Args:
        spec: what to open.
        merge: frames per temporal cell of the model, for pseudo-videos.

    Returns:
        Its samples; nothing is decoded yet.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ModuleNotFoundError: pyarrow is needed and missing; the message says how to get it.
        ValueError: a file is damaged as a whole, or nothing is left of it.
    """
    if isinstance(spec, WorldConfig):
        return _open_world(spec)
    if isinstance(spec, CompositeConfig):
        from score_vllm.train.world.composite_source import CompositeSource

        return CompositeSource.for_training(spec.split or "policy", spec.limit or 10_000, spec.path)
    if isinstance(spec, OneVisionConfig):
        if importlib.util.find_spec("pyarrow") is None:
            raise MissingError("source of kind 'onevision-pseudo' needs pyarrow: pip install score-vllm[train]")
        from score_vllm.train.data.pseudo import OneVisionPseudoSource

        return OneVisionPseudoSource(spec, merge)
    if isinstance(spec, KoalaConfig):
        from score_vllm.train.data.koala import KoalaSource

        return KoalaSource(spec)
    if isinstance(spec, StillsConfig):
        return StillsSource(spec, merge)
    from score_vllm.train.data.records import JsonlSource, LlavaVideoSource

    return LlavaVideoSource(spec) if isinstance(spec, LlavaVideoConfig) else JsonlSource(spec)


def mixed(sources: Sequence[SampleSource], weights: Sequence[float], seed: int = 0) -> SampleSource:
    """One source as it is, several as a mixture by their weights."""
    return sources[0] if len(sources) == 1 else MixedSource(sources, weights, seed)


class MixedSource:
    """Several sources in one, by index.

    Positions are dealt to the sources in a shuffled pattern of 1000 that repeats, so that every run of 1000 holds each
    source in proportion to its weight (at least once). Each source is walked through in its own order, from
    the start again when it ends: before that, nothing repeats. The length is the sum of the lengths.

    Args:
        sources: not empty, each with samples.
        weights: one per source, > 0.
        seed: of the pattern.

    Raises:
        ValueError: the lists differ in length, a source is empty, or a weight is not a finite number > 0.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], seed: int = 0) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(f"weights must be one per source, got {len(weights)} for {len(sources)} sources")
        if len(sources) > _PERIOD:
            raise ValueError(f"sources must be at most {_PERIOD}, got {len(sources)}")
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if not 0 < weight < float("inf"):
                raise ValueError(f"weight of source {number} must be a finite number > 0, got {weight!r}")
            if not len(source):
                raise ValueError(f"source {number} of the mixture is empty")
        self.sources = list(sources)
        self._quotas = _quotas(weights)
        pattern = np.repeat(np.arange(len(sources)), self._quotas)
        self._pattern = np.random.default_rng([seed, 0x5C0]).permutation(pattern)
        # How often the same source stood before, within the period.
        self._rank = np.zeros(_PERIOD, dtype=np.int64)
        for number in range(len(sources)):
            places = self._pattern == number
            self._rank[places] = np.arange(places.sum())

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def locate(self, index: int) -> tuple[int, int]:
        """``(source, index in it)`` of a position.

        Raises:
            IndexError: ``index`` is outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample index must be in [0, {len(self)}), got {index}")
        period, place = divmod(index, _PERIOD)
        source = int(self._pattern[place])
        turn = period * int(self._quotas[source]) + int(self._rank[place])
        return source, turn % len(self.sources[source])

    def text(self, index: int) -> tuple[str, str]:
        """See :class:`~score_vllm.train.data.sample.SampleSource`."""
        source, place = self.locate(index)
        return self.sources[source].text(place)

    def questions(self, index: int) -> Sequence[tuple[str, str, str]]:
        """See :class:`~score_vllm.train.data.sample.AskingSource`."""
        source, place = self.locate(index)
        found = self.sources[source]
        return found.questions(place) if isinstance(found, AskingSource) else ()

    def __getitem__(self, index: int) -> TrainingSample:
        """Sample ``index``; keys begin with the source's number.

        Raises:
            BrokenSampleError: as the source's.
            IndexError: ``index`` is outside [0, len).
        """
        source, place = self.locate(index)
        try:
            sample = self.sources[source][place]
        except BrokenSampleError as error:
            raise BrokenSampleError(f"{source}/{error}") from error
        return dataclasses.replace(sample, key=f"{source}/{sample.key}")


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """[S] places of each source in the period: largest remainders, none without a place."""
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.max()
    wanted = shares / shares.sum() * _PERIOD
    quotas = np.maximum(1, np.floor(wanted).astype(np.int64))
    while (rest := _PERIOD - int(quotas.sum())) != 0:
        step = 1 if rest > 0 else -1
        lack = np.where(quotas + step >= 1, (wanted - quotas) * step, -np.inf)
        quotas[int(np.argmax(lack))] += step
    return quotas


def _open_world(spec: WorldConfig) -> SampleSource:
    if importlib.util.find_spec("score_vllm.train.world.scenes") is None:
        raise ConfigurationError(
            f"source of kind {spec.kind!r}: this installation has no score_vllm.train.world.scenes"
        )
    world = importlib.import_module("score_vllm.train.world.scenes")
    options: dict[str, object] = {}
    if spec.split:
        options["split"] = spec.split
    if spec.limit:
        options["size"] = spec.limit
    source: SampleSource = (world.PseudoWorldSource if spec.kind == "world-pseudo" else world.WorldSource)(**options)
    return source
