"""The two servers that benchmarks compare: vanilla vLLM and score-serve, on the loopback.

Both read videos with score-vllm's loader and run with every cache off, so that they do the same work for the same
request and nothing is answered from memory. "Vanilla" is ``vllm serve`` with vLLM's own model class and processor.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from benchmarks.serving.model import BenchModel
from benchmarks.serving.process import end_tidily_when_terminated, free_port, running_process

INSERVER = Path(__file__).resolve().parent / "inserver"
ROOT = INSERVER.parents[2]
VLLM_CLI = INSERVER / "vllm_cli.py"
SERVED_NAME = "bench"
KINDS = ("vanilla", "score")


@dataclass(frozen=True)
class ServerOptions:
    """What both kinds of server are started with.

    Attributes:
        model: what is served.
        dtype: of the engine.
        length: context in tokens, and most tokens of an engine step; a whole uncompressed video must fit.
        max_frames: most frames read from a video.
        media: folder that ``file://`` URLs may point into.
        kv_gib: KV cache on a CPU, in GiB.
        extra: further options of vLLM's server, for both.
        spans: folder for stage spans; None installs no stopwatch.
        cell_cache_gib: of SCORE's cell cache.
    """

    model: BenchModel
    dtype: str
    length: int
    max_frames: int
    media: Path
    kv_gib: int = 2
    extra: Sequence[str] = ()
    spans: Path | None = None
    cell_cache_gib: float = 0


@dataclass
class Server:
    """A running server."""

    kind: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page, see :func:`parse_metrics`."""
        return parse_metrics(httpx.get(f"{self.url}/metrics", timeout=30).text)


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of a Prometheus text page, summed over their labels except ``le`` and ``kind``.

    Returns:
        ``{"vllm:time_to_first_token_seconds_sum": 1.5, 'x_bucket{le="1"}': 3.0, ...}``.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$", line)
        if match is None:
            continue
        name, labels, value = match.groups()
        kept = re.findall(r'\b(?:le|kind)="[^"]*"', labels or "")
        key = f"{name}{{{','.join(kept)}}}" if kept else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def has_gpu() -> bool:
    """True where torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


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
        command += ["--cell-cache-gib", str(options.cell_cache_gib)]
    else:
        command = [sys.executable, str(VLLM_CLI), "serve", options.model.path]
        command += ["--media-io-kwargs", json.dumps({"video": loader})]
    command += ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", options.dtype, "--max-model-len", str(options.length), "--seed", "0"]
    # vLLM refuses a video that has more tokens than a step.
    command += ["--max-num-batched-tokens", str(options.length)]
    command += ["--mm-processor-cache-gb", "0", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 1})]
    command += ["--allowed-local-media-path", str(options.media), "--allowed-media-domains", "127.0.0.1"]
    if not has_gpu():
        command += ["--enforce-eager"]  # compiling for a CPU takes longer than the benchmark
    return [*command, *options.extra]


def environment(kind: str, options: ServerOptions, plugin_folder: Path) -> dict[str, str]:
    """Environment of a server: no network, our benchmark plug-in, and SCORE's where it compresses."""
    write_plugin_metadata(plugin_folder)
    paths = [str(plugin_folder), str(INSERVER), str(ROOT), os.environ.get("PYTHONPATH", "")]
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
def running(kind: str, options: ServerOptions, folder: Path) -> Iterator[Server]:
    """A server while the body runs; its log goes to ``folder``.

    Raises:
        RuntimeError: it ended, or was not ready in time; the log's end and its path are in the message.
    """
    end_tidily_when_terminated()
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / f"{kind}-{port}.log"
    plugin_folder = Path(tempfile.mkdtemp(prefix="score-bench-"))
    command, env = command_line(kind, options, port), environment(kind, options, plugin_folder)
    try:
        with running_process(command, url, log, env, plugin_folder) as process:
            yield Server(kind, url, log, process)
    finally:
        shutil.rmtree(plugin_folder, ignore_errors=True)


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serves a folder over HTTP on the loopback; yields its base URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
