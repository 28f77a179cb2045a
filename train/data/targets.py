"""What the targets of a stage look like: lengths in tokens, a few of them, and whether they are worth training on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from score_vllm.train.data.record_index import sample_rows
from score_vllm.train.data.sample import BrokenSampleError, SampleSource
from score_vllm.train.schema import ConfigurationError

# Targets looked at per source.
LOOKED_AT = 200
SHOWN = 5
MIN_MEDIAN_TOKENS = 8
_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BAR = 40


@dataclass(frozen=True)
class Targets:
    """A sample of a source's targets.

    Attributes:
        lengths: [n] int64, tokens.
        examples: up to five ``(prompt, target)``.
        broken: records that could not be read.
    """

    lengths: np.ndarray
    examples: list[tuple[str, str]]
    broken: int

    def lines(self) -> Iterator[str]:
        """A histogram of the lengths, and the examples."""
        if self.lengths.size:
            quarter, median, three = np.percentile(self.lengths, (25, 50, 75), method="lower")
            yield (
                f"target tokens of {self.lengths.size} samples: median {median}, quartiles {quarter} and {three}, "
                f"{self.lengths.min()} to {self.lengths.max()}"
            )
        for low, high in zip(_EDGES, (*_EDGES[1:], None), strict=True):
            count = int(((self.lengths >= low) & (self.lengths < (high or np.inf))).sum())
            if count:
                name = f"{low}+" if high is None else f"{low}-{high - 1}" if high - 1 > low else f"{low}"
                yield f"  {name:>7} {'#' * max(1, round(_BAR * count / self.lengths.size)):<{_BAR}} {count}"
        if self.broken:
            yield f"  {self.broken} of {self.broken + self.lengths.size} records are broken"
        for prompt, target in self.examples:
            yield f"  asked {_short(prompt, 70)!r}, answer {_short(target, 110)!r}"


def look_at(source: SampleSource, count_tokens: Callable[[str], int], seed: int = 0) -> Targets:
    """Read a seeded sample of a source's texts; no video is decoded.

    Args:
        source: of the targets.
        count_tokens: of the model's tokenizer.
        seed: of the sample.
    """
    rows = sample_rows(len(source), LOOKED_AT, seed)
    lengths, examples, broken = [], [], 0
    for row in rows:
        try:
            prompt, target = source.text(row)
        except BrokenSampleError:
            broken += 1
            continue
        lengths.append(count_tokens(target))
        examples.append((prompt, target))
    step = max(1, len(examples) // SHOWN)
    return Targets(np.asarray(lengths, dtype=np.int64), examples[::step][:SHOWN], broken)


def require_descriptions(stage: str, found: Sequence[Targets], weights: Sequence[float], allow_short: bool) -> None:
    """Refuse a stage whose targets are mostly letters and words: the paper's reward needs dense captions.

    Args:
        stage: its name.
        found: per source.
        weights: per source, of the mixture.
        allow_short: ``allow_short_targets`` of the stage.

    Raises:
        ConfigurationError: the median target has fewer than 8 tokens, or no target could be read.
    """
    lengths = np.concatenate([targets.lengths for targets in found])
    if not lengths.size:
        raise ConfigurationError(f"stage.{stage}.sources: no sample's text could be read")
    shares = np.concatenate(
        [np.full(t.lengths.size, w / max(1, t.lengths.size)) for t, w in zip(found, weights, strict=True)]
    )
    order = np.argsort(lengths, kind="stable")
    median = int(lengths[order][np.searchsorted(np.cumsum(shares[order]), shares.sum() / 2)])
    if median < MIN_MEDIAN_TOKENS and not allow_short:
        raise ConfigurationError(
            f"stage.{stage}: the median target has {median} tokens, fewer than {MIN_MEDIAN_TOKENS}; the method is "
            f"trained on descriptions (--check shows what is read): choose captions, or set "
            f"stage.{stage}.allow_short_targets=true"
        )


def _short(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
