"""Servers for benchmarks: vanilla vLLM and score-serve as processes on the loopback, their metrics and their memory.

Both read videos with score-vllm's loader and run with every cache off, so that they do the same work for the same
request and nothing is answered from memory. "Vanilla" is ``vllm serve`` with vLLM's own model class and processor.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from bench_model import BenchModel
from monitoring import parse_metrics
from streaming import Answer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VLLM_CLI = HERE / "inserver" / "vllm_cli.py"
SERVED_NAME = "bench"
KINDS = ("vanilla", "score")


@dataclass(frozen=True)
class ServerOptions:
    """What both kinds of server are started with.

    Attributes:
        model: what is served.
        dtype: of the engine.
        max_model_len: in tokens; a whole uncompressed video must fit.
        batch_tokens: most tokens of an engine step; vLLM refuses a video that has more.
        max_frames: most frames read from a video.
        media: folder that ``file://`` URLs may point into.
        kv_gib: KV cache on a CPU, in GiB.
        extra: further options of vLLM's server, for both.
        spans: folder for stage spans; None installs no stop-watch.
    """

    model: BenchModel
    dtype: str
    max_model_len: int
    batch_tokens: int
    max_frames: int
    media: Path
    kv_gib: int = 2
    extra: Sequence[str] = ()
    spans: Path | None = None


@dataclass
class Server:
    """A running server."""

    kind: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page, see :func:`parse_metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return parse_metrics(answer.read().decode())

    def post(self, body: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """One chat completion, not streamed.

        Raises:
            RuntimeError: the server answered with an error; its text and the log's path are in the message.
        """
        data = json.dumps({**body, "stream": False, "stream_options": None}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise RuntimeError(f"the {self.kind} server answered {error.code}: {text} (log: {self.log})") from error


def stream(server: Server, body: dict[str, Any]) -> Answer:
    """Send one request over a fresh connection and read its answer as it comes.

    Raises:
        RuntimeError: the status is not 200.
    """
    host = urllib.parse.urlsplit(server.url).netloc
    data = json.dumps(body).encode()
    connection = http.client.HTTPConnection(host, timeout=600)
    try:
        answer = Answer(time.monotonic())
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{server.kind} answered {response.status}: {response.read()[:500]!r} ({server.log})")
        while data := response.read1(1 << 16):
            answer.feed(data, time.monotonic())
        return answer
    finally:
        connection.close()


def free_port() -> int:
    """A port of the loopback that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(kind: str, options: ServerOptions, port: int) -> list[str]:
    """How a server is started.

    Raises:
        ValueError: ``kind`` is none of :data:`KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    loader = {"video_backend": "score_pyav", "num_frames": options.max_frames, "fps": 2}
    if kind == "score":
        command = [sys.executable, "-m", "score_vllm.server.cli", "--model", options.model.path]
        command += ["--policy", options.model.policy, "--max-frames", str(options.max_frames), "--fps", "2"]
    else:
        command = [sys.executable, str(VLLM_CLI), "serve", options.model.path]
        command += ["--media-io-kwargs", json.dumps({"video": loader})]
    command += ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", options.dtype, "--max-model-len", str(options.max_model_len), "--seed", "0"]
    command += ["--max-num-batched-tokens", str(options.batch_tokens)]
    command += ["--mm-processor-cache-gb", "0", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 1})]
    command += ["--allowed-local-media-path", str(options.media), "--allowed-media-domains", "127.0.0.1"]
    if not has_gpu():
        command += ["--enforce-eager"]  # compiling for a CPU takes longer than the benchmark
    return [*command, *options.extra]


def has_gpu() -> bool:
    """True where torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def environment(kind: str, options: ServerOptions, plugin_folder: Path) -> dict[str, str]:
    """Environment of a server: no network, our benchmark plug-in, and SCORE's where it compresses."""
    write_plugin_metadata(plugin_folder)
    paths = [str(plugin_folder), str(HERE / "inserver"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    extra = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_PLUGINS": "score_bench,score" if kind == "score" else "score_bench",
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
    }
    if Path(options.model.path).is_dir():
        extra["HF_HUB_OFFLINE"] = "1"
    if options.spans is not None:
        extra["SCORE_BENCH_SPANS"] = str(options.spans)
    kept = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "SCORE_BENCH_SPANS")}
    return {**kept, **extra}


def write_plugin_metadata(folder: Path) -> None:
    """What makes :mod:`score_bench_plugin` an entry point without installing it: a distribution's metadata folder."""
    metadata = folder / "score_bench-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: score-bench\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nscore_bench = score_bench_plugin:install\n")


@contextlib.contextmanager
def running(kind: str, options: ServerOptions, folder: Path, seconds: float = 1200) -> Iterator[Server]:
    """A server while the body runs; ended by its own process id.

    Args:
        kind: ``vanilla`` or ``score``.
        options: see :class:`ServerOptions`.
        folder: for the log.
        seconds: how long the start may take.

    Raises:
        RuntimeError: it ended, or was not ready in time; the log's end and its path are in the message.
    """
    end_tidily_when_terminated()
    port = free_port()
    log = folder / f"{kind}-{port}.log"
    plugin_folder = Path(tempfile.mkdtemp(prefix="score-bench-"))
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command_line(kind, options, port),
            env=environment(kind, options, plugin_folder),
            cwd=plugin_folder,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    server = Server(kind, f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_ready(server, seconds)
        yield server
        if process.poll() is not None:
            raise RuntimeError(f"the {kind} server died during the run (log: {log}):\n{_tail(log)}")
    finally:
        stop(process)
        shutil.rmtree(plugin_folder, ignore_errors=True)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _wait_ready(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (code := server.process.poll()) is not None:
            raise RuntimeError(f"the {server.kind} server ended with {code} (log: {server.log}):\n{_tail(server.log)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=2)
            return
        time.sleep(0.3)
    raise RuntimeError(
        f"the {server.kind} server was not ready in {seconds:g} s (log: {server.log}):\n{_tail(server.log)}"
    )


def end_tidily_when_terminated() -> None:
    """Make SIGTERM unwind the main thread like Ctrl-C does, so that no server outlives its benchmark."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process by its own id."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serves a folder over HTTP on the loopback; yields its base URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
