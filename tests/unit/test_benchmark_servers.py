"""What the serving benchmarks start, feed and watch: servers, clips, memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psutil")
from benchmarks import clips
from benchmarks.serving import model as bench_model
from benchmarks.serving import monitoring, process, server

ROOT = Path(__file__).resolve().parents[2]


def test_metrics_are_summed_over_engines() -> None:
    page = """# HELP vllm:x text
vllm:x_sum{engine="0",model_name="a b"} 1.5
vllm:x_sum{engine="1",model_name="a b"} 2
score_visual_tokens_total{kind="retained"} 7.0
vllm:x_bucket{engine="0",le="+Inf"} 3
process_open_fds 12"""
    assert server.parse_metrics(page) == {
        "vllm:x_sum": 3.5,
        'score_visual_tokens_total{kind="retained"}': 7.0,
        'vllm:x_bucket{le="+Inf"}': 3.0,
        "process_open_fds": 12.0,
    }


def test_memory_of_this_process_is_seen() -> None:
    # Pages of its own: an array may lie in memory that the allocator holds since another test.
    with mmap.mmap(-1, 64 << 20) as block:
        before = monitoring.tree_rss(os.getpid())
        np.frombuffer(block, np.uint8)[:] = 1
        assert monitoring.tree_rss(os.getpid()) - before > len(block) // 2


def test_clips_are_seeded_distinct_and_read_whole(tmp_path: Path) -> None:
    from score_vllm.video import decode_video

    shape = clips.ClipShape(8, 112, 84)
    first, second = clips.write_clips(tmp_path, shape, [0, 1])
    assert first.read_bytes() != second.read_bytes()
    content = first.read_bytes()
    assert clips.write_clip(tmp_path / "again.mp4", shape, 0).read_bytes() == content
    assert decode_video(content).frames.shape == (8, 112, 84, 3), "the sampling rule drops no frame"
    assert shape.visual_tokens == 4 * 4 * 3
    for bad in ((3, 112, 112), (5, 112, 112), (8, 20, 112), (8, 112, 57)):
        with pytest.raises(ValueError, match="must be an even number"):
            clips.ClipShape(*bad)


def test_both_servers_run_without_caches(tmp_path: Path) -> None:
    model = bench_model.BenchModel("model", "policy", "a model")
    options = server.ServerOptions(model, "float32", 4096, 16, tmp_path)
    vanilla, score = (server.command_line(kind, options, 1234) for kind in server.KINDS)
    for command in (vanilla, score):
        assert command[command.index("--mm-processor-cache-gb") + 1] == "0"
        assert "--no-enable-prefix-caching" in command
        assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "score_vllm.server.cli" in score
    assert not any("score_vllm" in word or word in ("--policy", "--retention") for word in vanilla)
    with pytest.raises(ValueError, match="kind must be"):
        server.command_line("other", options, 1)


def test_real_weights_need_a_policy() -> None:
    with pytest.raises(ValueError, match="--policy is needed"):
        bench_model.resolve_model("owner/name", None)


KILLED_DRIVER = """
import subprocess, sys, time
sys.path.append({root!r})
from benchmarks.serving import process
process.end_tidily_when_terminated()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
try:
    print(child.pid, flush=True)
    time.sleep(600)
finally:
    process.stop(child)
"""


def test_a_terminated_driver_ends_its_server() -> None:
    import psutil

    code = KILLED_DRIVER.format(root=str(ROOT))
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    assert psutil.pid_exists(child)
    driver.terminate()
    assert driver.wait(60) == 143
    driver.stdout.close()
    assert not psutil.pid_exists(child)


def test_bench_model_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_model, "TEXT_CONFIG", {**bench_model.TEXT_CONFIG, **small})
    monkeypatch.setattr(bench_model, "VISION_CONFIG", {**bench_model.VISION_CONFIG, "depth": 1, "out_hidden_size": 64})
    model, policy = bench_model.ensure_bench_model()
    stamp = (model / "model.safetensors").stat().st_mtime_ns
    assert (policy / "policy.safetensors").is_file()
    assert bench_model.ensure_bench_model() == (model, policy)
    assert (model / "model.safetensors").stat().st_mtime_ns == stamp


FAKE_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_process_is_a_server_while_the_body_runs(tmp_path: Path) -> None:
    port = process.free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = [sys.executable, "-c", FAKE_SERVER, str(port)]
    with process.running_process(command, url, log, dict(os.environ)) as running:
        assert running.poll() is None
    assert running.poll() is not None

    def die() -> None:
        with process.running_process(command, url, log, dict(os.environ)) as running:
            running.kill()
            running.wait(60)

    with pytest.raises(RuntimeError, match="the server died during the run"):
        die()
    broken = [sys.executable, "-c", "raise SystemExit('no such option')"]
    with (
        pytest.raises(RuntimeError, match=r"ended with 1 .*\nno such option"),
        process.running_process(broken, url, log, dict(os.environ)),
    ):
        pass
