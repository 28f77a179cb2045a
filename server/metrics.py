"""Prometheus metrics of compression. Names start with ``score_``: vLLM unregisters everything named ``vllm:*``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from score_vllm.models.processing import VideoReport
from score_vllm.models.timing import BUCKETS, read_histogram

RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)

_videos = Counter("score_videos", "Videos that requests brought in.")
_tokens = Counter(
    "score_visual_tokens",
    "Tokens of videos: visual before and after compression, and timestamps, markers and newlines.",
    ["kind"],
)
_ratios = Histogram("score_retention_ratio", "Retention ratio of each video.", buckets=RATIO_BUCKETS)
for _kind in ("original", "retained", "structure"):
    _tokens.labels(_kind)


def count_videos(reports: Iterable[VideoReport]) -> None:
    """Add the videos of one request."""
    for report in reports:
        _videos.inc()
        _tokens.labels("original").inc(report.grid.num_tokens)
        _tokens.labels("retained").inc(report.retained_tokens)
        _tokens.labels("structure").inc(report.structure_tokens)
        _ratios.observe(report.spec.retention_ratio)


class CompressorSecondsCollector(Collector):
    """Reads the workers' timings at scrape time; see :mod:`score_vllm.models.timing`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> Sequence[HistogramMetricFamily]:
        """Name only: registering must not read files."""
        return [HistogramMetricFamily("score_compressor_seconds", "Seconds of selection per encoded video.")]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """One histogram over all workers."""
        counts, seconds = read_histogram(self._directory)
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        cumulative, running = [], 0
        for bound, count in zip(bounds, counts, strict=True):
            running += count
            cumulative.append((bound, running))
        family = HistogramMetricFamily("score_compressor_seconds", "Seconds of selection per encoded video.")
        family.add_metric([], cumulative, seconds)
        yield family


_collector: CompressorSecondsCollector | None = None


def expose_compressor_seconds(directory: Path) -> None:
    """Put the workers' histogram on the metrics page; a second call replaces the first."""
    global _collector
    if _collector is not None:
        REGISTRY.unregister(_collector)
    _collector = CompressorSecondsCollector(directory)
    REGISTRY.register(_collector)
