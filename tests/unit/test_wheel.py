"""The wheel, built from the sdist, works where no checkout is near."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM_"))}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel; third-party packages are borrowed from this one."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    # A copy without .git and build folders: building writes beside the sources.
    source = folder / "source"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "tests", "benchmarks", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=hidden)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    shutil.rmtree(source)
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path in a .pth file is searched, but its own .pth files are not read: the editable install stays out.
    lines = [sysconfig.get_path("purelib")]
    if importlib.util.find_spec("_score_vllm_torchvision_shim"):
        lines.append("import _score_vllm_torchvision_shim")  # where set-up had to mend torchvision
    (purelib / "borrowed.pth").write_text("\n".join(lines) + "\n")
    return environment / "bin"


def test_commands_start(installed: Path, tmp_path: Path) -> None:
    assert "--retention" in run(installed / "score-serve", "--help", cwd=tmp_path)
    assert "--method" in run(installed / "score-viz", "--help", cwd=tmp_path)
    planned = run(installed / "score-plan", "--model", "Qwen2.5-VL-7B", "--gpu-gib", "80", cwd=tmp_path)
    assert "49,152 visual tokens" in planned
    run(installed / "python", "-c", "from score_vllm.compatibility import tested_runs; tested_runs()", cwd=tmp_path)
    assert "--config" in run(installed / "python", "-m", "score_vllm.train", "--help", cwd=tmp_path)


def test_library_assets_and_licence_are_in_it(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, pathlib, torch, score_vllm, score_vllm.kernels.ops, score_vllm.train.configs\n"
        "from score_vllm.demo import ASSETS, demo_clip\n"
        "from score_vllm.video import decode_video\n"
        "policy = score_vllm.RetentionPolicy.from_pretrained(ASSETS / 'policy')\n"
        "x = torch.randn(4, 6, policy.config.hidden_size)\n"
        "print(score_vllm.__file__)\n"
        "print(score_vllm.select_tokens(x, 0.25, policy=policy, grid=score_vllm.VideoGrid(4, 2, 3)).num_retained)\n"
        "frames = decode_video(demo_clip().read_bytes()).frames\n"
        "print(len(frames), (ASSETS / 'model' / 'model.safetensors').is_file())\n"
        "print(sorted(p.name for p in pathlib.Path(list(score_vllm.train.configs.__path__)[0]).glob('demo.toml')))\n"
        "static = pathlib.Path(score_vllm.__file__).parent / 'server' / 'static'\n"
        "print(sorted(p.name for p in static.iterdir()))\n"
        "print(m.metadata('score-vllm')['License-Expression'], 'py.typed' in str(m.files('score-vllm')))\n"
    )
    where, kept, video, configs, static, metadata = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent), "not the checkout's"
    assert (kept, video, configs, metadata) == ("6", "32 True", "['demo.toml']", "Apache-2.0 True")
    assert static == str(["playground.css", "playground.html", "playground.js"])
