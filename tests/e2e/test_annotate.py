"""The annotator with our own server as its teacher; the demo's answers are noise, which the filters let pass here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from score_vllm import num_retained_tokens
from score_vllm.train.annotate.filters import REASONS
from score_vllm.train.data.sources import open_source, source_config

from .conftest import API_KEY, ROOT, Server


def annotate(server: Server, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "score_vllm.train.annotate", "--kind", "jsonl", "--data", str(data)]
    command += ["-o", str(output), "--base-url", f"{server.url}/v1", "--model", "demo", "--max-tokens", "8"]
    command += ["--api-key-env", "TEACHER_KEY", "--allow", ",".join(REASONS), "--backoff", "0.05", "--quiet", *more]
    env = {**os.environ, "TEACHER_KEY": API_KEY, "SCORE_CACHE": str(output.parent / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def dataset(path: Path, videos: list[Path]) -> Path:
    rows = [{"video": str(video), "prompt": f"What happens in clip {i}?"} for i, video in enumerate(videos)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def visual_tokens(server: Server, kind: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if f'score_visual_tokens_total{{kind="{kind}"}}' in line)


@pytest.mark.parametrize("send", ["file", "base64"])
def test_our_server_as_the_teacher(send: str, server: Server, tmp_path: Path) -> None:
    videos = [server.media / name for name in ("plain.mp4", "odd.mkv", "truncated.mp4", "one_frame.mp4")]
    data, output = dataset(tmp_path / "data.jsonl", videos), tmp_path / "out.jsonl"
    before = {kind: visual_tokens(server, kind) for kind in ("original", "retained")}
    done = annotate(server, data, output, "--send", send, "--retention-ratio", "0.5")
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    failures = [json.loads(line) for line in (tmp_path / "out.failures.jsonl").read_text().splitlines()]
    failed = [row["video"] for row in failures if row["status"] == "failed"]
    assert failed == [str(videos[2])], "the truncated clip is named, with the server's own words"
    assert "HTTP 400" in next(row["reason"] for row in failures if row["status"] == "failed")
    # Noise can be nothing but white space, which no option lets pass.
    assert len(rows) + len(failures) == 4
    assert {row["reason"] for row in failures if row["status"] == "rejected"} <= {"empty"}
    grew = {kind: visual_tokens(server, kind) - before[kind] for kind in before}
    assert grew["original"] > 0
    assert abs(grew["retained"] - num_retained_tokens(int(grew["original"]), 0.5)) <= len(videos), (
        "the ratio reached it"
    )
    if rows:
        source: Any = open_source(
            source_config(kind="jsonl", path=str(output), split="all", cache=str(tmp_path / "index"))
        )
        assert [source.record(i).target for i in range(len(source))] == [row["caption"].strip() for row in rows]
        assert source[0].frames.ndim == 4


def test_a_wrong_key_ends_the_run(server: Server, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data.jsonl", [server.media / "plain.mp4"])
    done = annotate(server, data, tmp_path / "out.jsonl", "--api-key-env", "NO_SUCH_KEY")
    assert done.returncode == 3
    assert "HTTP 401" in done.stderr
    assert API_KEY not in done.stdout + done.stderr
