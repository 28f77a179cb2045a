"""Ends of a server: asked for at any moment, or because one of its processes died. Nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")
from benchmarks.serving.process import free_port, stop, wait_ready
from tests.explained import kept_indices

from .conftest import API_KEY, SCORE_SERVE, Server, environment
from .requests_of import ask, chat, data_url, metrics

END_SECONDS = 10.0


def start(args: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            [str(SCORE_SERVE), *args], env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    while not what():
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def engine_of(process: subprocess.Popen[bytes]) -> psutil.Process | None:
    for child in descendants(process):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("VLLM::EngineCore"):
                return child
    return None


def left_behind(folder: Path) -> list[str]:
    """Of compilers' caches there may be some: they are meant to be found again."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


MOMENTS: dict[str, Callable[[subprocess.Popen[bytes], Path], bool]] = {
    "while modules are imported": lambda process, log: len(descendants(process)) == 1,
    "when the model is about to load": lambda process, log: "loading ..." in log.read_text(errors="replace"),
    "when the engine's process has come up": lambda process, log: engine_of(process) is not None,
}


@pytest.mark.parametrize(
    ("moment", "send"), [*zip(MOMENTS, (os.kill, os.killpg, os.kill), strict=True)], ids=("modules", "group", "engine")
)
def test_sigterm_while_starting_ends_everything(
    moment: str,
    send: Callable[[int, int], None],
    cache: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    temporary = tmp_path_factory.mktemp("t")
    log = tmp_path / "log"
    args = ["--model", "demo", "--host", "127.0.0.1", "--port", str(free_port())]
    process = start(args, environment(cache, TMPDIR=str(temporary)), log)
    try:
        wait_for(lambda: MOMENTS[moment](process, log), process, log)
        everything = descendants(process)
        assert everything
        began = time.monotonic()
        send(process.pid, signal.SIGTERM)
        assert process.wait(END_SECONDS) == 128 + signal.SIGTERM
        assert time.monotonic() - began < END_SECONDS
    finally:
        stop(process)
    assert not [child for child in everything if child.is_running()]
    assert left_behind(temporary) == []


@pytest.fixture(scope="module")
def two_api_servers(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Server]:
    """Behind one port, with two engines; its temporary folder is ``media``."""
    folder = tmp_path_factory.mktemp("two")
    temporary = tmp_path_factory.mktemp("t")
    port = free_port()
    args = ["--model", "demo", "--host", "127.0.0.1", "--port", str(port), "--api-server-count", "2"]
    args += ["--data-parallel-size", "2"]
    log = folder / "log"
    process = start([*args, "--api-key", API_KEY], environment(cache, TMPDIR=str(temporary)), log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, process, log, seconds=400)
        yield Server(url, log, process, temporary)
    finally:
        stop(process)


def test_two_api_servers_show_one_sum(two_api_servers: Server, clips: dict[str, Path]) -> None:
    """Whichever of them answers, its page has the videos of both and the histogram of both engines' workers."""
    before = metrics(two_api_servers)
    assert "score_nan_videos_total" in before

    def one(ratio: float) -> Any:
        return chat(two_api_servers, ask(data_url(clips["plain"])), retention_ratio=ratio, score_explain=True)

    ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    with ThreadPoolExecutor(len(ratios)) as pool:
        answers = list(pool.map(one, ratios))
    assert [answer.score["retention_ratio"] for answer in answers] == list(ratios)
    for answer in answers:  # explained by whichever engine served it
        (video,) = answer.score["videos"]
        assert len(kept_indices(video)) == video["retained_tokens"]
    for _ in range(6):
        after = metrics(two_api_servers)
        assert after["score_videos_total"] - before.get("score_videos_total", 0) == 6
        assert after["score_compressor_seconds_count"] - before["score_compressor_seconds_count"] == 6
        assert after['score_retention_ratio_bucket{le="0.3"}'] == 3
    with urllib.request.urlopen(f"{two_api_servers.url}/metrics") as page:
        assert {'engine="0"', 'engine="1"'} <= set(
            re.findall(r'request_success_total{(engine="\d")', page.read().decode())
        )


def test_when_the_engine_dies_the_server_says_so_and_ends(two_api_servers: Server) -> None:
    """Runs last: the module's server does not survive it."""
    engine = engine_of(two_api_servers.process)
    assert engine is not None
    name = engine.cmdline()[0].removeprefix("VLLM::").split()[0]
    everything = descendants(two_api_servers.process)
    engine.kill()
    assert two_api_servers.process.wait(60) > 0
    last = two_api_servers.text().strip().splitlines()[-1]
    assert last == f"score-serve: error: the process {name} (pid {engine.pid}) died; the server has stopped"
    assert not [process for process in everything if process.is_running()]
    assert left_behind(two_api_servers.media) == []
