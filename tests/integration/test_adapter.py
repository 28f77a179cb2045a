"""What the adapter refuses, and the loaders in vLLM's registry."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from score_vllm import RetentionPolicy
from score_vllm.config import FIRST_ARCHITECTURE, ServingConfig
from score_vllm.models import video_loaders
from score_vllm.models.adapter import check_engine_config, load_policy
from score_vllm.models.cell_records import EncodedCellsReader, EncodedCellsWriter, draw_ticket
from score_vllm.models.processing import VideoReport, VideoSpec
from score_vllm.models.timing import (
    BUCKETS,
    RING,
    STATS_VARIABLE,
    CompressorStats,
    Totals,
    _Video,
    read_stats,
    read_videos,
    stats_directory,
)
from score_vllm.models.video_options import VideoOptions
from score_vllm.server import endpoints
from score_vllm.server.context import RequestContext, ServerState
from score_vllm.server.metrics import CompressorCollector
from score_vllm.types import VideoGrid
from score_vllm.video import VideoError


def engine_config(**changes: Any) -> Any:
    options: dict[str, Any] = {"pipeline": 1, "dbo": False, "speculative": None, "pruning": None}
    options |= {"ubatch": False, "tower_lora": False, **changes}
    multimodal = SimpleNamespace(video_pruning_rate=options["pruning"])
    parallel = SimpleNamespace(
        pipeline_parallel_size=options["pipeline"], enable_dbo=options["dbo"], use_ubatching=options["ubatch"]
    )
    return SimpleNamespace(
        parallel_config=parallel,
        lora_config=SimpleNamespace(enable_tower_connector_lora=options["tower_lora"]),
        speculative_config=options["speculative"],
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
    )


def test_plain_engine_is_accepted() -> None:
    check_engine_config(engine_config())
    check_engine_config(engine_config(speculative=SimpleNamespace(method="ngram")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline": 2}, "--pipeline-parallel-size 2"),
        ({"dbo": True}, "--enable-dbo"),
        ({"ubatch": True}, "micro-batches"),
        ({"tower_lora": True}, "--enable-tower-connector-lora"),
        ({"speculative": SimpleNamespace(method="eagle")}, "'eagle'"),
        ({"pruning": 0.5}, "--video-pruning-rate 0.5"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_engine_config(engine_config(**change))


def test_policy_must_fit_the_model(tmp_path: Path) -> None:
    RetentionPolicy(48).save_pretrained(tmp_path / "p")
    assert load_policy(str(tmp_path / "p"), 48, FIRST_ARCHITECTURE).config.hidden_size == 48
    with pytest.raises(ValueError, match=r"hidden size 48, but the model has hidden size 3584"):
        load_policy(str(tmp_path / "p"), 3584, FIRST_ARCHITECTURE)


def test_policy_must_be_of_the_models_architecture(tmp_path: Path) -> None:
    """3,584 is both Qwen2.5-VL-7B and LLaVA-Video-7B; files from before the key was there are Qwen2.5-VL's."""
    llava, old = "LlavaOnevisionForConditionalGeneration", str(tmp_path / "old")
    RetentionPolicy(48).save_pretrained(old)
    with pytest.raises(ValueError, match=f"made for {FIRST_ARCHITECTURE}, but the model is a {llava}"):
        load_policy(old, 48, llava)
    RetentionPolicy(48, architecture=llava).save_pretrained(tmp_path / "new")
    assert load_policy(str(tmp_path / "new"), 48, llava).config.architecture == llava
    with pytest.raises(ValueError, match=f"made for {llava}, but the model is a {FIRST_ARCHITECTURE}"):
        load_policy(str(tmp_path / "new"), 48, FIRST_ARCHITECTURE)


@pytest.mark.parametrize("name", [video_loaders.PYAV_LOADER, video_loaders.DECORD_LOADER, "opencv"])
def test_loaders_read_the_same_clip(name: str, clips: dict[str, Path]) -> None:
    if name == video_loaders.DECORD_LOADER:
        pytest.importorskip("decord")
    loader = VIDEO_LOADER_REGISTRY.load(name)
    frames, metadata = loader.load_bytes(clips["plain"].read_bytes(), num_frames=12, fps=2)
    assert frames.shape == (12, 120, 160, 3)
    assert frames.dtype == np.uint8
    assert len(metadata["frames_indices"]) == 12
    assert metadata["do_sample_frames"] is False
    reference, _ = VIDEO_LOADER_REGISTRY.load(video_loaders.PYAV_LOADER).load_bytes(
        clips["plain"].read_bytes(), num_frames=12, fps=2
    )
    if name == video_loaders.DECORD_LOADER:
        assert np.abs(frames.astype(int) - reference.astype(int)).mean() < 4, "the same frames, another converter"


@pytest.mark.parametrize("name", [video_loaders.PYAV_LOADER, video_loaders.DECORD_LOADER])
@pytest.mark.parametrize("broken", ["empty", "not_a_video", "audio", "truncated", "playlist"])
def test_our_loaders_refuse_broken_files(name: str, broken: str, clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError):
        VIDEO_LOADER_REGISTRY.load(name).load_bytes(clips[broken].read_bytes())


def test_loader_options_are_checked(clips: dict[str, Path]) -> None:
    loader = VIDEO_LOADER_REGISTRY.load(video_loaders.PYAV_LOADER)
    data = clips["plain"].read_bytes()
    with pytest.raises(ValueError, match=r"unknown keys \['quality'\]"):
        loader.load_bytes(data, quality=3)
    with pytest.raises(VideoError, match="max_pixels = 64"):
        loader.load_bytes(data, max_pixels=64)


def test_timings_of_all_workers_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    since = time.monotonic()
    for pid, seconds in ((1, (0.0001, 0.003)), (2, (100.0,))):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        stats = CompressorStats(str(tmp_path))
        broken = torch.tensor(True)
        stats._record(_Video(selection=(0.0, 55.0), has_nan=broken))
        stats.reset()
        for key, value in enumerate(seconds, start=10 * pid):
            video = _Video(key, (1.0, 1.5), (2.0, 2.0 + value), broken if pid == 1 else None)
            stats._record(video)
        stats.count_cells(encoded=pid, reused=10, cache_bytes=1000)
    totals = read_stats(tmp_path)
    (counts, total), tower = totals.compressor, totals.tower
    assert len(counts) == len(BUCKETS) + 1
    assert counts[0] == 1
    assert counts[BUCKETS.index(0.005)] == 1
    assert counts[-1] == 1
    assert sum(counts) == 3
    assert total == pytest.approx(100.0031)
    assert totals.nan_videos == 2
    assert (totals.encoded_cells, totals.reused_cells, totals.cache_bytes) == (3, 20, 2000)
    assert (tower.counts[BUCKETS.index(0.5)], sum(tower.counts), tower.seconds) == (3, 3, 1.5)
    empty = ([0] * len(counts), 0.0)
    assert read_stats(tmp_path / "nowhere") == Totals(empty, empty, 0, 0, 0, 0)
    assert read_videos(tmp_path, [11, 20, 99], since) == {11: (0.5, pytest.approx(0.003)), 20: (0.5, 100.0)}
    assert read_videos(tmp_path, [11], time.monotonic()) == {}
    assert read_videos(tmp_path, [], since) == {}


def test_the_tower_is_timed_video_by_video(tmp_path: Path) -> None:
    stats, device, since = CompressorStats(str(tmp_path)), torch.device("cpu"), time.monotonic()

    def tower() -> Iterator[float]:
        for seconds in (0.01, 0.02):
            time.sleep(seconds)
            yield seconds

    for _ in stats.encoding(tower(), torch.tensor([2**53 - 1, 8]), device):
        with stats.measure(device):
            pass
    with stats.measure(device):
        pass
    found = read_videos(tmp_path, [2**53 - 1, 8], since)
    assert found[2**53 - 1][0] >= 0.01
    assert found[8][0] >= 0.02
    read = read_stats(tmp_path)
    assert (sum(read.compressor.counts), sum(read.tower.counts)) == (3, 2), "embeddings and the like have no tower"


def test_a_tower_that_was_not_watched_has_no_time(tmp_path: Path) -> None:
    """With graphs of the encoder, rows are there before selection begins."""
    stats, device = CompressorStats(str(tmp_path)), torch.device("cpu")
    for _ in stats.encoding([1.0], [7], device):
        with stats.measure(device):
            pass
    tower, selection = read_videos(tmp_path, [7], 0.0)[7]
    assert math.isnan(tower)
    assert selection >= 0
    assert sum(read_stats(tmp_path).tower.counts) == 0


def test_the_ring_of_videos_goes_round(tmp_path: Path) -> None:
    stats = CompressorStats(str(tmp_path))
    for key in range(1, RING + 3):
        stats._record(_Video(key, (0.0, 1.0), (1.0, 2.0)))
    assert set(read_videos(tmp_path, range(1, RING + 3), 0.0)) == set(range(3, RING + 3))


def test_cells_and_the_cache_are_on_the_metrics_page(tmp_path: Path) -> None:
    stats = CompressorStats(str(tmp_path))
    stats.count_cells(encoded=3, reused=1, cache_bytes=500)
    stats.count_cells(encoded=0, reused=4, cache_bytes=400)
    samples = {s.name: s.value for family in CompressorCollector(tmp_path).collect() for s in family.samples}
    assert samples["score_encoded_cells_total"] == 3
    assert samples["score_reused_cells_total"] == 5
    assert samples["score_cell_cache_bytes"] == 400


def test_each_video_hears_once_what_was_encoded_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = []
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        writers.append(EncodedCellsWriter(str(tmp_path)))
    reader, one, other = EncodedCellsReader(tmp_path), draw_ticket(), draw_ticket()
    assert one != other
    assert reader.take(one) == 0
    writers[0].write(one, 8)
    writers[1].write(other, 3)
    assert (reader.take(one), reader.take(other)) == (8, 3)
    assert (reader.take(one), reader.take(other)) == (0, 0), "of two requests at once for one video, one encoded it"
    for _ in range(3):  # encoded again after preemption, and for other videos, past the end of the ring
        for _ in range(2000):
            writers[0].write(other, 1)
        writers[0].write(one, 8)
        assert reader.take(one) == 8
    assert reader.take(one) == 0
    assert reader.take(other) == 4093
    assert EncodedCellsReader(tmp_path / "nowhere").take(one) == 0


def test_nan_videos_are_counted_logged_and_on_the_metrics_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = CompressorStats(str(tmp_path))
    for has_nan in (False, True, True):
        with stats.measure(torch.device("cpu")) as video:
            video.has_nan = torch.tensor(has_nan)
    assert stats.nan_videos == 2
    assert [record.args for record in caplog.records] == [(1,), (2,)]
    samples = {s.name: s.value for family in CompressorCollector(tmp_path).collect() for s in family.samples}
    assert samples["score_nan_videos_total"] == 2
    assert samples["score_compressor_seconds_count"] == 3


def test_events_without_choices_stay_as_they_are() -> None:
    error = 'data: {"error": {"message": "late"}}\n\n'
    assert endpoints._with_score(error, {"method": "x"}) == error


@pytest.mark.parametrize("chunks", [[": ping\n\n"], []])
def test_streams_without_answers_pass_through(chunks: list[str]) -> None:
    async def events() -> Any:
        for chunk in [*chunks, "data: [DONE]\n\n"]:
            yield chunk

    async def collect() -> list[str]:
        request = RequestContext(None)
        state = ServerState(ServingConfig(1.0, "uniform"), None)
        return [e async for e in endpoints._stream_with_score(events(), state, [request])]

    assert asyncio.run(collect()) == [*chunks, "data: [DONE]\n\n"]


def test_a_stream_says_the_same_at_both_ends(tmp_path: Path) -> None:
    """Also how many cells were encoded, which a reader hears once; two videos of one ticket share them."""
    ticket = draw_ticket()
    EncodedCellsWriter(str(tmp_path)).write(ticket, 5)
    spec = VideoSpec(0.5, "uniform", VideoOptions())
    report = VideoReport(VideoGrid(8, 2, 2), 16, spec, 8, ticket=ticket)
    request = RequestContext(None, reports=[report, report], encoded=EncodedCellsReader(tmp_path))
    chunk = 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason":%s}]}\n\n'

    async def events() -> Any:
        for text in (chunk % "null", chunk % "null", chunk % '"stop"', "data: [DONE]\n\n"):
            yield text

    async def collect() -> list[str]:
        state = ServerState(ServingConfig(1.0, "uniform"), None)
        return [e async for e in endpoints._stream_with_score(events(), state, [request])]

    first, middle, last, done = asyncio.run(collect())
    assert (middle, done) == (chunk % "null", "data: [DONE]\n\n")
    scores = [json.loads(text.removeprefix("data: "))["score"] for text in (first, last)]
    assert scores[0] == scores[1]
    assert [(v["encoded_cells"], v["reused_cells"]) for v in scores[0]["videos"]] == [(5, 3), (0, 8)]


def test_a_worker_on_another_machine_keeps_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API process's folder is not there: the engine must start all the same."""
    for value, expected in ((str(tmp_path), str(tmp_path)), (str(tmp_path / "elsewhere"), None)):
        monkeypatch.setenv(STATS_VARIABLE, value)
        assert stats_directory() == expected
    monkeypatch.delenv(STATS_VARIABLE)
    assert stats_directory() is None
