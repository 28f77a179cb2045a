"""score-serve doctor as a process, on a sound machine and on broken ones."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from benchmarks.serving.process import free_port
from score_vllm.compatibility import TIERS, TestedRun
from score_vllm.server import doctor, doctor_probe

DOCTOR = [str(Path(sys.executable).parent / "score-serve"), "doctor"]


def examine(*argv: str, **environment: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Any]]:
    """Exit code, findings by name, and the whole of the JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} | environment
    done = subprocess.run([*DOCTOR, "--json", *argv], capture_output=True, text=True, env=env, timeout=400)
    answer = json.loads(done.stdout)
    assert "Traceback" not in done.stderr, done.stderr
    assert len({finding["name"] for finding in answer["findings"]}) == len(answer["findings"])
    return done.returncode, {finding["name"]: finding for finding in answer["findings"]}, answer


def test_a_sound_machine(tmp_path: Path) -> None:
    code, found, answer = examine(
        "--model", "demo", "--port", str(free_port()), "--max-frames", "32",
        SCORE_CACHE=str(tmp_path), TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert (code, answer["error"]) == (0, 0), answer
    for name in ("entry points", "port", "codecs", "decoding", "plug-in in workers", "plug-in in API processes"):
        assert found[name]["state"] == "ok", found[name]
    assert found["versions"]["state"] in ("ok", "warning")
    assert found["device"]["detail"]
    assert "select tokens on the" in found["kernels"]["detail"]
    assert "method score at retention 0.1" in found["model"]["detail"]
    assert "architecture Qwen2_5_VLForConditionalGeneration" in found["policy"]["detail"]
    assert re.search(r"32 frames of \d+ x \d+: 3,072 visual tokens", found["host memory"]["detail"])
    assert found["model memory"]["state"] == "ok"
    assert not list(tmp_path.glob("score-serve-*")), "the doctor is no server"


SABOTAGE = """
import os, sys

if any("spawn_main" in argument for argument in sys.orig_argv):
    os.environ["VLLM_PLUGINS"] = "something_else"
"""


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    """One finding each, all of them in one run."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, found, answer = examine(
            "--model", "demo", "--host", "127.0.0.1", "--port", port, "--policy", str(tmp_path / "missing"),
            PYTHONPATH=str(tmp_path), SCORE_CACHE=str(tmp_path),
        )  # fmt: skip
    assert code == 1
    wrong = {name: finding for name, finding in found.items() if finding["state"] == "error"}
    assert set(wrong) == {"port", "plug-in in workers", "options"}
    assert answer["error"] == 3
    assert port in wrong["port"]["detail"]
    assert "choose another --port" in wrong["port"]["remedy"]
    assert "'something_else'" in wrong["plug-in in workers"]["detail"]
    assert "--policy: policy directory" in wrong["options"]["detail"]
    assert all(finding["remedy"] for finding in wrong.values())


@pytest.mark.parametrize(
    ("body", "timeout", "ended"),
    [("os._exit(3)", "60", "ended with exit code 3"), ("time.sleep(100)", "1", "took longer than --timeout")],
)
def test_a_vllm_that_crashes_or_hangs(body: str, timeout: str, ended: str, tmp_path: Path) -> None:
    site = f"import os, sys, time\nif any('spawn_main' in word for word in sys.orig_argv):\n    {body}\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    code, found, _ = examine("--timeout", timeout, "--port", str(free_port()), PYTHONPATH=str(tmp_path))
    assert code == 1
    assert found["vLLM"]["detail"] == f"a process with vLLM {ended}"


def test_the_main_process_imports_no_vllm() -> None:
    code = "import sys\nsys.modules['vllm'] = None\nimport score_vllm.server.cli, score_vllm.server.doctor\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd="/").returncode == 0


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = dict.fromkeys(TIERS, 9)
    run = TestedRun("0.32.0", "5.19.0", "2.13.0", "3.11.7", "cpu", "2026-01-01", passed, {}, {})
    monkeypatch.setattr("score_vllm.compatibility.tested_runs", lambda: [run])
    monkeypatch.setattr("score_vllm.plugin.installed_version", lambda: "0.32.1")
    monkeypatch.setattr("importlib.metadata.version", {"transformers": "5.19.4", "torch": "2.13.0+cpu"}.get)
    monkeypatch.setattr("platform.python_version", lambda: "3.11.2")
    (finding,) = doctor.check_versions()
    assert finding.state == "ok"
    monkeypatch.setattr("platform.python_version", lambda: "3.13.0")
    (finding,) = doctor.check_versions()
    assert (finding.state, "no test run had Python 3.13.0" in finding.detail) == ("warning", True)
    monkeypatch.setattr("score_vllm.plugin.installed_version", lambda: "0.33.0")
    monkeypatch.delenv("SCORE_ALLOW_UNTESTED_VLLM", raising=False)
    (finding,) = doctor.check_versions()
    assert (finding.state, finding.detail) == (
        "error", "vLLM 0.33.0 has not been tested with score-vllm, only 0.32 has"
    )  # fmt: skip
    assert "SCORE_ALLOW_UNTESTED_VLLM=1" in finding.remedy


def test_codecs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    left = {name for name in av.codecs_available if not name.startswith(("hevc", "h264"))}
    monkeypatch.setattr(av, "codecs_available", left)
    codecs, decoding = doctor.check_decoders("pyav")
    assert (codecs.state, codecs.detail.endswith("no decoder for h264, hevc")) == ("warning", True)
    assert decoding.state == "ok"
    assert str(codecs) == f"warning  codecs: {codecs.detail}\n         -> {codecs.remedy}"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "check_entry_points", lambda: 1 / 0)
    monkeypatch.setattr(
        doctor, "check_processes", lambda argv, timeout: iter([doctor.Finding("vLLM", "ok", str(argv))])
    )
    assert doctor.main(["--model", "demo", "--port", str(free_port())]) == 1
    said = capsys.readouterr().out
    assert "error    entry points: the check itself failed: ZeroDivisionError" in said
    assert "['--model', 'demo', '--port'" in said
    assert said.rstrip().endswith("1 errors")


def memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, gib: float, **changes: Any) -> doctor_probe.Found:
    """What the doctor says of Qwen2.5-VL-7B's memory on a GPU, at the server's defaults."""
    limit = SimpleNamespace(max_frames=128, width=768, height=784, tokens=49152)
    config = SimpleNamespace(dtype=torch.bfloat16, max_model_len=128000)
    engine = SimpleNamespace(create_model_config=lambda: config)
    processor = SimpleNamespace(info=SimpleNamespace(video_limit=limit))
    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs.from_cli_args", lambda args: engine)
    monkeypatch.setattr("vllm.multimodal.MULTIMODAL_REGISTRY.create_processor", lambda config: processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, gib * 2**30))
    given = {"model": "Qwen2.5-VL-7B", "retention": 0.1, "tensor_parallel_size": 1, "cell_cache_gib": None}
    *_, found = doctor_probe.check_memory(SimpleNamespace(**{**given, "gpu_memory_utilization": 0.92, **changes}))
    assert found["name"] == "model memory"
    return found


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large = memory_of_a_gpu(monkeypatch, 80)
    assert large["state"] == "ok", large["detail"]
    assert "26.10 GiB of the GPU's 73.6 before the KV cache" in large["detail"]
    assert "cell cache 3.20" in large["detail"]
    assert "cell cache 1.00" in memory_of_a_gpu(monkeypatch, 80, cell_cache_gib=1.0)["detail"]
    assert "ratio 1 exceeds memory" in memory_of_a_gpu(monkeypatch, 28)["detail"]
    assert memory_of_a_gpu(monkeypatch, 24)["state"] == "error"
