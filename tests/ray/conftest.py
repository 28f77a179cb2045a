"""A Ray cluster of this machine on the loopback, whose "GPUs" are CPU engines; all that it started is ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.serving.process import free_port, stop

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).with_name("plugin")


@dataclass
class Cluster:
    """A running cluster, and the environment of everything that uses it."""

    env: dict[str, str]
    process: subprocess.Popen[bytes]

    def actors(self, name: str) -> list[psutil.Process]:
        """Processes of the cluster whose title begins so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def environment(folder: Path, address: str) -> dict[str, str]:
    """The platform plug-in is found by its metadata, nothing is installed; nothing leaves the loopback."""
    metadata = folder / "plugin" / "ray_cpu_platform-0.dist-info"
    shutil.copytree(PLUGIN, metadata.parent, ignore=shutil.ignore_patterns("__pycache__"))
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu-platform\nVersion: 0\n")
    entry = "[vllm.platform_plugins]\nray_cpu = ray_cpu_platform:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(metadata.parent), str(ROOT)]),
        "VLLM_PLUGINS": "score,ray_cpu",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_ADDRESS": address,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Makes Ray take 127.0.0.1 as it is; else it puts the machine's own address in its place and listens there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "SCORE_CACHE": str(folder / "cache"),
    }


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not (BIN / "ray").exists():
        pytest.fail("Ray is not installed; run these tests with: make test-ray")
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    env = environment(folder, f"127.0.0.1:{port}")
    # Its sockets have long names.
    short = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--num-gpus=3", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--ray-client-server-port={free_port()}"]
    command += ["--object-store-memory=200000000", f"--temp-dir={short}"]
    log = folder / "ray.log"
    # Without RAY_ADDRESS: a head is what the others connect to.
    own = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=own, stdout=sink, stderr=subprocess.STDOUT)
    try:
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Cluster(env, process)
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        stop(process)
        _, alive = psutil.wait_procs(started, 20)
        for left in alive:
            left.kill()
        shutil.rmtree(short, ignore_errors=True)
    assert not psutil.wait_procs(alive, 10)[1]
