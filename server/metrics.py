"""Prometheus metrics of compression. Names start with ``score_``: vLLM unregisters everything named ``vllm:*``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from fastapi import FastAPI, Request
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response
from vllm.v1.metrics.prometheus import get_prometheus_registry

from score_vllm.models.processing import VideoReport
from score_vllm.models.timing import BUCKETS, read_stats

SECONDS = ("score_compressor_seconds", "Seconds of selection per encoded video.")
TOWER_SECONDS = ("score_tower_seconds", "Seconds of the vision tower per encoded video.")
NAN_VIDEOS = ("score_nan_videos", "Videos whose scores were NaN: broken vision features, and a broken answer.")
ENCODED_CELLS = ("score_encoded_cells", "Temporal cells that the vision tower encoded.")
REUSED_CELLS = ("score_reused_cells", "Temporal cells of encoded videos whose tower output was in the cell cache.")
CACHE_BYTES = ("score_cell_cache_bytes", "Bytes of the cells in the cell cache.")
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


class CompressorCollector(Collector):
    """Reads the workers' numbers at scrape time; see :mod:`score_vllm.models.timing`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> Sequence[Metric]:
        """Names only: registering must not read files."""
        counters = [CounterMetricFamily(*name) for name in (NAN_VIDEOS, ENCODED_CELLS, REUSED_CELLS)]
        histograms = [HistogramMetricFamily(*name) for name in (SECONDS, TOWER_SECONDS)]
        return [*histograms, *counters, GaugeMetricFamily(*CACHE_BYTES)]

    def collect(self) -> Iterable[Metric]:
        """Sums over all workers."""
        totals = read_stats(self._directory)
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        for name, measured in ((SECONDS, totals.compressor), (TOWER_SECONDS, totals.tower)):
            histogram = HistogramMetricFamily(*name)
            histogram.add_metric([], list(zip(bounds, accumulate(measured.counts), strict=True)), measured.seconds)
            yield histogram
        yield CounterMetricFamily(*NAN_VIDEOS, value=totals.nan_videos)
        yield CounterMetricFamily(*ENCODED_CELLS, value=totals.encoded_cells)
        yield CounterMetricFamily(*REUSED_CELLS, value=totals.reused_cells)
        yield GaugeMetricFamily(*CACHE_BYTES, value=totals.cache_bytes)


_collector: CompressorCollector | None = None


def expose_workers(directory: Path) -> None:
    """Put the workers' numbers on the metrics page; a second call replaces the first."""
    global _collector
    if _collector is not None:
        REGISTRY.unregister(_collector)
    _collector = CompressorCollector(directory)
    REGISTRY.register(_collector)


def attach_page(app: FastAPI) -> None:
    """With several API servers vLLM's page shows what they left in files, not this process's registry; ours shows the
    workers' numbers besides."""
    if get_prometheus_registry() is REGISTRY:
        return

    def page(request: Request) -> Response:
        registry = get_prometheus_registry()
        if _collector is not None:
            registry.register(_collector)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    app.add_api_route("/metrics", page, methods=["GET"], include_in_schema=False)
