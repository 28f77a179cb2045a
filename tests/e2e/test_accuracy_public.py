"""The public sets through a real server, in three-question files of each format; as a user runs them, from a shell.

The demo's answers are noise here, so these tests are about plumbing: counts, tokens by ratio, failures, resuming.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from score_vllm import num_retained_tokens
from tests.conftest import moving_square, write_clip
from tests.public_sets import videomme_rows, write_lvbench, write_mlvu, write_videomme

pytest.importorskip("pyarrow")
from .conftest import API_KEY, ROOT, Server

RATIOS = (1.0, 0.25, 0.1)
SHARED = ("nasa_13013.mp4", "video_90.mov", "bt709_full_range.mp4")
GROUPS = {
    "videomme": ["short", "medium", "long"],
    "mlvu": ["plotQA", "needle", "count"],
    "lvbench": ["key information retrieval", "event understanding", "reasoning"],
}


@pytest.fixture
def made_clips(server: Server) -> list[Path]:
    """Three clips of different lengths in a folder that the server may read."""
    folder = server.media / "public"
    folder.mkdir(exist_ok=True)
    lengths = (24, 48, 40)
    return [write_clip(folder / f"c{n}.mp4", moving_square(n, 120, 160, seed=n)) for n in lengths]


def write_set(benchmark: str, folder: Path, videos: Sequence[Path]) -> Path:
    """A three-question file of a set, about these videos."""
    if benchmark == "videomme":
        return write_videomme(folder / "test-00000-of-00001.parquet", videomme_rows([v.stem for v in videos]))
    if benchmark == "mlvu":
        return write_mlvu(folder / "json", [v.name for v in videos])
    return write_lvbench(folder / "video_info.meta.jsonl", [v.stem for v in videos])


def command(server: Server, benchmark: str, data: Path, videos: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--benchmark", benchmark, "--data", str(data), "--videos", str(videos), "--output", str(output)]
    return [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), *fixed, "--base-url", f"{server.url}/v1", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OPENAI_API_KEY": API_KEY, "PYTHONPATH": str(ROOT)}


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment(), timeout=300)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def check(output: Path, benchmark: str) -> None:
    """Every question answered at every ratio, and exactly the tokens that each ratio should keep."""
    content = json.loads(output.read_text())
    assert [row["retention_ratio"] for row in content["rows"]] == list(RATIOS)
    for row in content["rows"]:
        assert (row["scored"], row["failed"], row["not_asked"], row["complete"]) == (3, 0, 0, True)
        assert row["headline"]["total"] == 3
        assert row["headline"]["low"] <= row["headline"]["accuracy"] <= row["headline"]["high"]
        assert list(row["groups"]) == GROUPS[benchmark]
        assert row["methods"] == ["score"]
    tokens = {(r["id"], float(r["ratio"])): r["prompt_tokens"] for r in records(output.with_suffix(".answers.jsonl"))}
    assert len(tokens) == 9
    for question in {key[0] for key in tokens}:
        whole, quarter, tenth = (tokens[question, ratio] for ratio in RATIOS)
        fits = [
            n
            for n in range(1, whole)
            if n - num_retained_tokens(n, 0.25) == whole - quarter and n - num_retained_tokens(n, 0.1) == whole - tenth
        ]
        assert fits, f"no number of video tokens explains {whole}, {quarter}, {tenth} prompt tokens"


@pytest.mark.parametrize("send", ["file", "base64"])
@pytest.mark.parametrize("benchmark", list(GROUPS))
def test_made_clips(benchmark: str, send: str, server: Server, made_clips: list[Path], tmp_path: Path) -> None:
    data = write_set(benchmark, tmp_path, made_clips)
    arguments = ["--send", send, "--retention-ratio", *map(str, RATIOS)]
    done = run(command(server, benchmark, data, made_clips[0].parent, tmp_path / "out.json", *arguments), tmp_path)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out.json", benchmark)
    assert "tokens per request" in done.stdout


@pytest.mark.parametrize("benchmark", list(GROUPS))
def test_shared_clips(benchmark: str, server: Server, shared_videos: Path, tmp_path: Path) -> None:
    data = write_set(benchmark, tmp_path, [shared_videos / name for name in SHARED])
    arguments = ["--retention-ratio", *map(str, RATIOS)]
    done = run(command(server, benchmark, data, shared_videos, tmp_path / "out.json", *arguments), tmp_path)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "out.json", benchmark)


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_failed_request_is_never_scored(fault: str, server: Server, clips: dict[str, Path], tmp_path: Path) -> None:
    """One video is not there, or no video: the score is withheld, the failure named; later the run completes."""
    folder = tmp_path / "videos"
    folder.mkdir()
    paths = [folder / f"{stem}.mp4" for stem in ("one", "two", "three")]
    for path in paths[:2]:
        path.write_bytes(clips["plain"].read_bytes())
    if fault == "broken":
        paths[2].write_bytes(clips["not_a_video"].read_bytes())
    data = write_set("videomme", tmp_path, paths)
    output = tmp_path / "out.json"
    arguments = command(server, "videomme", data, folder, output, "--retention-ratio", "0.25")
    done = run(arguments, tmp_path)
    assert done.returncode == 1
    assert "003-1: " + {"missing": "video 'three' not found", "broken": "HTTP 400"}[fault] in done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["headline"], row["groups"], row["failed"]) == (None, {}, 1)
    paths[2].write_bytes(clips["plain"].read_bytes())
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["headline"]["total"] == 3
    statuses = [(r["id"], r["status"]) for r in records(output.with_suffix(".answers.jsonl"))]
    assert sorted(statuses[:3]) == [("001-1", "answered"), ("002-1", "answered"), ("003-1", "failed")]
    assert statuses[3:] == [("003-1", "answered")]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.01)


def test_a_killed_run_goes_on(server: Server, made_clips: list[Path], tmp_path: Path) -> None:
    """SIGKILL after the first answers; the second run asks only for the rest."""
    data = write_set("lvbench", tmp_path, made_clips)
    output, answers = tmp_path / "out.json", tmp_path / "out.answers.jsonl"
    ratios = [str(n / 40) for n in range(40, 20, -1)]
    arguments = command(server, "lvbench", data, made_clips[0].parent, output, "--retention-ratio", *ratios)
    arguments += ["--concurrency", "1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    _wait_for(lambda: answers.exists() and answers.read_bytes().count(b"\n") > 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    kept = answers.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 3 < kept.count(b"\n") < 61
    assert not output.exists()
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers.read_bytes().startswith(kept), "nothing was lost"
    keys = [(r["ratio"], r["id"]) for r in records(answers)]
    assert len(keys) == len(set(keys)) == 60, "nothing was asked twice"
    assert all(row["scored"] == 3 for row in json.loads(output.read_text())["rows"])
