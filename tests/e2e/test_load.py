"""The locustfile against the session's server, by the load benchmark and by itself: streamed, checked, counted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("locust") is None:  # importing it would put gevent in the place of this process's threads
    pytest.skip("locust is not installed", allow_module_level=True)
pytest.importorskip("openai")
pytest.importorskip("psutil")
from benchmarks.clips import ClipShape, write_clips
from benchmarks.serving import server as servers
from benchmarks.serving.aggregate import aggregate
from benchmarks.serving.client import Counts
from benchmarks.serving.load import LOCUSTFILE, make_requests, question, run_level
from benchmarks.serving.monitoring import Monitor

from .conftest import API_KEY, Server
from .test_serve import ask, chat, data_url

SHAPE = ClipShape(8, 112, 112)


@pytest.fixture
def served_clips(server: Server, tmp_path: Path) -> list[Path]:
    """Six clips in the folder that the server may read."""
    return [Path(shutil.copy(clip, server.media)) for clip in write_clips(tmp_path / "clips", SHAPE, range(6))]


@pytest.fixture
def counts(server: Server, tmp_path: Path) -> Counts:
    """Token counts of a clip as the server reports them itself."""
    (clip,) = write_clips(tmp_path / "first", SHAPE, [10**6])
    answer = chat(server, ask(data_url(clip), text=question(0)), retention_ratio=1.0, max_tokens=1)
    original = answer.score["videos"][0]["original_tokens"]
    return Counts(original, answer.usage.prompt_tokens - original)


def test_the_users_stream_mixed_ratios_without_a_failure(
    server: Server, counts: Counts, served_clips: list[Path], tmp_path: Path
) -> None:
    requests = make_requests(counts, served_clips, (1.0, 0.25, 0.1), 6, max_tokens=5)
    watched = servers.Server("score", server.url, server.log, server.process)
    with Monitor(watched, interval=0.1) as monitor:
        records = run_level(server.url, "demo", requests, 2, tmp_path, API_KEY)
    assert [record["error"] for record in records] == [None] * 6
    assert [record["retention_ratio"] for record in records] == [1.0, 0.25, 0.1] * 2
    row = aggregate(records, 6)
    assert row["failures"] == 0
    assert all(record["ttft"] > 0 and len(record["itl"]) == 4 for record in records)
    assert row["prompt_tokens"] == sum(counts.prompt(request.ratio) for request in requests)
    assert max(record["client_cpu"] for record in records) > 0
    assert monitor.peak_rss > 1 << 28


def test_what_is_wrong_is_a_failure_and_not_a_number(
    server: Server, counts: Counts, served_clips: list[Path], tmp_path: Path
) -> None:
    """A wrong count, a refused ratio, a missing clip, a wrong key: each is recorded, and none of them ends the run."""
    requests = make_requests(counts, served_clips, (0.25,), 4, max_tokens=2)
    requests[0] = replace(requests[0], counts=Counts(counts.visual, counts.text + 1))
    requests[1] = replace(requests[1], ratio=7)
    served_clips[2].unlink()
    records = run_level(server.url, "demo", requests, 2, tmp_path, API_KEY)
    errors = [record["error"] for record in records]
    assert "tokens instead of" in errors[0]
    assert errors[1].startswith("status 400: ")
    assert errors[2].startswith("status 4")
    assert errors[3] is None
    assert aggregate(records, 4)["failures"] == 3
    (record,) = run_level(server.url, "demo", requests[3:], 1, tmp_path, "another key")
    assert record["error"].startswith("status 401")


def test_the_locustfile_by_itself(server: Server, tmp_path: Path) -> None:
    """As a user runs it: the demo's clips as bytes, a ratio, until the time is up."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", server.url, "--json"]
    command += ["--users", "1", "--run-time", "8s", "--retention-ratio", "0.25", "--max-tokens", "4"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "LOCUST_API_KEY": API_KEY}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)}
    whole, first = rows["POST"], rows["TTFT"]
    assert whole["num_requests"] == first["num_requests"] > 0
    assert whole["num_failures"] == 0
    assert first["max_response_time"] < whole["max_response_time"]
