"""Which clips a report measures: fixed ones that training did not see, where the source can give such."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from score_vllm.train.config import OWN_HELD_OUT, StageSettings, TrainSettings
from score_vllm.train.data.config import CompositeConfig, FileConfig, JsonlConfig, SourceConfig, WorldConfig
from score_vllm.train.data.sample import AskingSource, BrokenSampleError, SampleSource, TrainingSample
from score_vllm.train.data.sources import mixed, open_source
from score_vllm.train.frozen.model import EncodedSample, Engine
from score_vllm.train.schema import ConfigurationError

# A split of the worlds that no training names.
SPLIT = "report"
MOST_ATTEMPTS = 4


@dataclass(frozen=True)
class ReportClip:
    """A clip as the report uses it: its sample, what the engine made of it, and ``(kind, question, answer)`` of each
    question about it."""

    sample: TrainingSample
    encoded: EncodedSample
    questions: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class ReportSource:
    """Samples to measure; ``seen`` says that training used them, too."""

    samples: SampleSource
    seen: bool


def open_report_source(settings: TrainSettings, stage: StageSettings, merge: int) -> ReportSource:
    """The sources of the run's last stage, in the split that it did not see.

    Args:
        settings: of the run.
        stage: the last one that was run.
        merge: frames per temporal cell of the model.

    Raises:
        ConfigurationError: not even the sources of training can be opened.
    """
    if settings.clips:
        own = next(s for one in settings.stages for s in one.sources if isinstance(s, JsonlConfig))
        held_out = str(settings.described / OWN_HELD_OUT)
        unseen: list[SourceConfig | None] = [own.model_copy(update={"path": held_out, "split": "all"})]
    else:
        unseen = [_unseen(spec) for spec in stage.sources]
    with contextlib.suppress(ConfigurationError):  # nothing is left in that split
        if all(unseen):
            return ReportSource(_open([spec for spec in unseen if spec], merge, settings.seed), seen=False)
    return ReportSource(_open(stage.sources, merge, settings.seed), seen=True)


def _open(specs: Sequence[SourceConfig], merge: int, seed: int) -> SampleSource:
    return mixed([open_source(spec, merge) for spec in specs], [spec.weight for spec in specs], seed)


def _unseen(spec: SourceConfig) -> SourceConfig | None:
    if isinstance(spec, (WorldConfig, CompositeConfig)):
        return spec.model_copy(update={"split": SPLIT})
    if isinstance(spec, FileConfig) and spec.split in ("", "train") and spec.held_out:
        return spec.model_copy(update={"split": "held_out", "limit": 0})
    return None


def read_clips(
    source: SampleSource, stage: StageSettings, engine: Engine, count: int, questions: int
) -> Iterator[ReportClip]:
    """Up to ``count`` clips in a fixed order; broken ones are passed over, a bounded number of them.

    Args:
        source: of the samples.
        stage: bounds the frames.
        engine: encodes.
        count: of clips.
        questions: most of each clip.
    """
    found = 0
    for index in np.random.default_rng(0).permutation(len(source))[: count * MOST_ATTEMPTS].tolist():
        if found == count:
            return
        try:
            sample = source[index]
            if stage.min_frames <= len(sample.frames) <= stage.max_frames:
                asked = source.questions(index) if isinstance(source, AskingSource) else ()
                yield ReportClip(sample, engine.encode(sample), tuple(asked)[:questions])
                found += 1
        except BrokenSampleError:
            continue
