"""One running score-serve per session, as a process, on the loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.process import free_port, running_process
from score_vllm.demo import demo_model
from tests.conftest import SERVED, write_selector

API_KEY = "test-key"
ROOT = Path(__file__).resolve().parents[2]
SCORE_SERVE = Path(sys.executable).parent / "score-serve"


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def demo_selector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random VisionSelector weights for the demo model."""
    return write_selector(demo_model(), tmp_path_factory.mktemp("selector") / "selector")


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, clips: dict[str, Path], cache: Path, demo_selector: Path
) -> Iterator[Server]:
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
    args += ["--allow-methods", ",".join(SERVED), "--selector", str(demo_selector)]
    log = folder / "server.log"
    command = [str(SCORE_SERVE), *args]
    # Raises with the end of the log where the server does not start, or dies during the tests.
    with running_process(command, url, log, environment(cache)) as process:
        yield Server(url, log, process, media)
    assert not re.search(r"EngineDeadError|EngineCore encountered", log.read_text(errors="replace"))
