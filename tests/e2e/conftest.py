"""One running score-serve per session, as a process, on the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from score_vllm import methods

API_KEY = "test-key"
ROOT = Path(__file__).resolve().parents[2]
SCORE_SERVE = Path(sys.executable).parent / "score-serve"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(cache: Path, **extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return {
        **kept,
        "SCORE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
        "VLLM_NO_USAGE_STATS": "1",
        **extra,
    }


@dataclass
class Server:
    """A running server and where its output goes."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    media: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def client(self, api_key: str = API_KEY) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, timeout=120, max_retries=0)


def start(args: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen([str(SCORE_SERVE), *args], env=env, stdout=sink, stderr=subprocess.STDOUT)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server by its own process id."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"score-serve ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        time.sleep(0.3)
    pytest.fail(f"score-serve was not ready in {seconds} s:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Path], cache: Path) -> Iterator[Server]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("server")
    media = folder / "media"
    media.mkdir()
    for path in clips.values():
        shutil.copy(path, media / path.name)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    args = ["--model", "demo", "--retention", "0.1", "--host", "127.0.0.1", "--port", str(port)]
    args += ["--api-key", API_KEY, "--allowed-local-media-path", str(media), "--allowed-media-domains", "127.0.0.1"]
    args += ["--allow-methods", ",".join(methods.names())]
    log = folder / "server.log"
    process = start(args, environment(cache), log)
    try:
        wait_ready(url, process, log)
        yield Server(url, log, process, media)
        assert process.poll() is None, f"the server died during the tests:\n{log.read_text(errors='replace')[-4000:]}"
        assert not re.search(r"EngineDeadError|EngineCore encountered", log.read_text(errors="replace"))
    finally:
        stop(process)
