"""Engines under Ray give what one process gives; what is served, counted and lost there.

Ordered: each test goes on with what the one before it has started.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

pytest.importorskip("vllm")
from benchmarks.serving.process import free_port, stop, wait_ready
from score_vllm.demo import demo_clip
from score_vllm.train.annotate.filters import REASONS
from tests.conftest import write_clip
from tests.video_writing import numbered

from .conftest import BIN, ROOT, Cluster

# Two servers with three engines start side by side: minutes on two busy cores.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
TOKENS = 24
QUESTIONS = ("What happens?", "How many things are there?")
OTHER_RATIO = 0.5


@dataclass
class Rows:
    """A data set of good and broken videos, and what one process without Ray answers about it."""

    data: Path
    folder: Path
    captions: list[dict[str, Any]]
    failures: list[dict[str, Any]]


def run(cluster: Cluster, *command: str, ray: bool = True) -> subprocess.CompletedProcess[str]:
    """A program of ours in the cluster's environment; without Ray it is vLLM's own CPU platform."""
    env = cluster.env if ray else {k: v for k, v in cluster.env.items() if not k.startswith("RAY_")}
    env = env if ray else {**env, "VLLM_PLUGINS": "score"}
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)


def annotate(cluster: Cluster, data: Path, output: Path, *more: str, ray: bool = True) -> tuple[list[Any], list[Any]]:
    """Captions and failures."""
    command = ["-m", "score_vllm.train.annotate", "--kind", "jsonl", "--data", str(data), "-o", str(output)]
    command += [
        "--model",
        "demo",
        "--max-tokens",
        str(TOKENS),
        "--retention-ratio",
        "0.1",
        "--allow",
        ",".join(REASONS),
    ]
    done = run(cluster, *command, *more, ray=ray)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "2 failed" in done.stdout
    both = (output, output.with_suffix(".failures.jsonl"))
    captions, failures = ([json.loads(line) for line in path.read_text().splitlines()] for path in both)
    return captions, failures


@pytest.fixture(scope="module")
def rows(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    clips = folder / "clips"
    clips.mkdir()
    shutil.copy(demo_clip(), clips / "a.mp4")
    for name, first in (("b", 0), ("c", 100)):
        write_clip(clips / f"{name}.mp4", np.stack([numbered(first + i) for i in range(24)]))
    (clips / "d_broken.mp4").write_bytes(demo_clip().read_bytes()[:3000])
    data = folder / "data.jsonl"
    asked = [{"video": str(path), "prompt": q} for path in sorted(clips.iterdir())[:3] for q in QUESTIONS]
    asked += [{"video": str(clips / name), "prompt": QUESTIONS[0]} for name in ("d_broken.mp4", "e_missing.mp4")]
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return Rows(data, folder, *annotate(cluster, data, folder / "one.jsonl", "--backend", "engine", ray=False))


def test_two_actors_annotate_as_one_process_also_where_they_die(cluster: Cluster, rows: Rows) -> None:
    """Both are killed once an answer is there; Ray starts them again, and what they had in work is done again."""
    assert len(rows.captions) == 6
    assert rows.captions[0]["caption"].startswith("A cyan star stays at the top right.")
    output = rows.folder / "two.jsonl"
    more = ("--backend", "ray", "--actors", "2", "--batch", "1", "--partition", "1")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(annotate, cluster, rows.data, output, *more)
        killed = kill_after_the_first_answer(cluster, output, done)
        assert done.result() == (rows.captions, rows.failures)
    assert len(killed) == 2


def kill_after_the_first_answer(cluster: Cluster, output: Path, done: Future[Any]) -> list[psutil.Process]:
    """The actors, killed."""
    while not any('"status": "ok"' in path.read_text() for path in output.parent.glob(f"{output.stem}*")):
        assert not done.done()
        time.sleep(0.02)
    actors = [actor for actor in cluster.actors("ray::") if "_Actor" in " ".join(actor.cmdline())]
    for actor in actors:
        actor.kill()
    return actors


def test_a_folder_is_captioned_by_two_actors_and_goes_on_where_it_ended(cluster: Cluster, rows: Rows) -> None:
    output = rows.folder / "captions"
    command = ["examples/caption_folder.py", str(rows.folder / "clips"), "-o", str(output), "--prompt", QUESTIONS[0]]
    command += ["--actors", "2", "--partition", "1", "--max-tokens", str(TOKENS)]
    done = run(cluster, *command)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "4 videos, 4 of 4 partitions to do" in done.stdout
    assert "3 captioned, 1 failed" in done.stdout
    assert f"failed: {rows.folder / 'clips' / 'd_broken.mp4'}: the file is damaged" in done.stdout
    assert "video/s" in done.stderr, "rate and time left are shown"
    written = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    captions = [json.loads(path.read_text()) for path in sorted(output.iterdir())]
    one = [row["caption"] for row in rows.captions if row["prompt"] == QUESTIONS[0]]
    assert [row["caption"].strip() for row in captions if "caption" in row] == one
    assert len(written) == 4
    # Nothing to do: no engine starts.
    again = run(cluster, *command)
    assert "0 of 4 partitions to do" in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == written


@dataclass
class Server:
    """A score-serve whose engines are Ray's."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def chat(self, tokens: int, video: Path | None = None, **fields: Any) -> httpx.Response:
        content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[0]}]
        if video is not None:
            content.insert(0, {"type": "video_url", "video_url": {"url": video.as_uri()}})
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": tokens, **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=300)

    def wait(self) -> None:
        wait_ready(self.url, self.process, self.log, 1200)

    def metrics(self) -> list[str]:
        return httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()

    def running(self) -> list[float]:
        """Requests in work, per engine."""
        lines = [line for line in self.metrics() if line.startswith("vllm:num_requests_running")]
        return [float(line.rsplit(" ", 1)[1]) for line in sorted(lines)]


Start = Callable[[str], Server]
OPTIONS = {
    "two": ["--data-parallel-size", "2", "--data-parallel-backend", "ray", "--api-server-count", "1"],
    "one": ["--distributed-executor-backend", "ray"],
}


@pytest.fixture(scope="module")
def start(cluster: Cluster, rows: Rows) -> Iterator[Start]:
    """Starts a server by the name of its options; does not wait for it."""
    with ExitStack() as stack:

        def start_one(name: str) -> Server:
            port = free_port()
            command = [str(BIN / "score-serve"), "--model", "demo", "--host", "127.0.0.1", "--port", str(port)]
            command += ["--allowed-local-media-path", str(rows.folder), *OPTIONS[name]]
            log = rows.folder / f"{name}-{port}.log"
            sink = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(command, env=cluster.env, stdout=sink, stderr=subprocess.STDOUT)
            stack.callback(stop, process)
            return Server(f"http://127.0.0.1:{port}", process, log)

        yield start_one


@pytest.fixture(scope="module")
def servers(start: Start) -> dict[str, Server]:
    """Two engines behind one server, and one behind another; the start of one overlaps that of the other."""
    started = {name: start(name) for name in OPTIONS}
    for server in started.values():
        server.wait()
    return started


@pytest.mark.parametrize("name", ["two", "one"])
def test_servers_answer_as_one_process(name: str, cluster: Cluster, rows: Rows, servers: dict[str, Server]) -> None:
    server = servers[name]
    # A file of its own: one that is there already would be resumed, and nobody asked.
    output = rows.folder / f"server_{name}.jsonl"
    captions, _ = annotate(cluster, rows.data, output, "--base-url", f"{server.url}/v1", "--send", "file")
    assert captions == rows.captions


def test_ratio_per_request_and_metrics_per_engine(rows: Rows, servers: dict[str, Server]) -> None:
    server, clip = servers["two"], rows.folder / "clips" / "a.mp4"
    answers = [server.chat(4, clip, retention_ratio=ratio).json() for ratio in (0.1, OTHER_RATIO) * 2]
    kept = [answer["score"]["videos"][0]["retained_tokens"] for answer in answers]
    assert kept == [102, 512, 102, 512]
    lines = server.metrics()
    for engine in ("0", "1"):
        done = [line for line in lines if line.startswith(f'vllm:request_success_total{{engine="{engine}"')]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in done) > 0, "both engines have answered"
    ours = {line.split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("score_")}
    assert ours["score_videos_total"] >= 10
    assert ours["score_compressor_seconds_count"] > 0, "the workers under Ray write where the page reads"


def test_a_dead_engine_takes_its_own_server_down_and_no_other(
    cluster: Cluster, rows: Rows, servers: dict[str, Server]
) -> None:
    """vLLM ends a server with the first of its engines; requests of other servers go on."""
    with ThreadPoolExecutor(8) as pool:

        def ask(server: Server, count: int) -> list[Any]:
            return [pool.submit(server.chat, 1500, ignore_eos=True) for _ in range(count)]

        doomed, others = ask(servers["two"], 4), ask(servers["one"], 2)
        # However vLLM deals them to the engines.
        while sum(servers["two"].running()) < 4 or sum(servers["one"].running()) < 2:
            assert not any(request.done() for request in (*doomed, *others))
            time.sleep(0.1)
        cluster.actors("ray::EngineCoreActor")[0].kill()
        assert [request.result().status_code for request in others] == [200, 200]
        assert [request.result().status_code for request in doomed] == [500] * 4
    assert servers["two"].process.wait(60) > 0


def test_what_is_left_is_free_for_the_next_start(cluster: Cluster, servers: dict[str, Server]) -> None:
    stop(servers["one"].process)
    assert servers["one"].process.returncode == 0
    left = cluster.actors("ray::EngineCoreActor") + cluster.actors("ray::RayWorkerProc")
    assert not psutil.wait_procs(left, 60)[1]


def test_the_server_that_went_down_starts_again_and_answers(cluster: Cluster, rows: Rows, start: Start) -> None:
    server = start("two")
    server.wait()
    output = rows.folder / "restarted.jsonl"
    captions, _ = annotate(cluster, rows.data, output, "--base-url", f"{server.url}/v1", "--send", "file")
    assert captions == rows.captions
