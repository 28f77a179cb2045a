"""Make the project's environment in ``.venv`` and install score-vllm in it, editable. Run by ``make setup``.

Standard library only: it runs before anything is installed. Safe to run again; a stamp makes the second run a
matter of milliseconds. Options:

    --extra NAME     cpu or cuda; by default cuda where nvidia-smi sees a GPU, else cpu
    --force          ignore the stamp
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "score-setup.stamp"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM = (3, 11)
CANDIDATES = ("python3.12", "python3.11", "python3.13", "python3")

# The ordinary torchvision wheel is linked against CUDA's torch and dies on import beside a CPU torch, because the
# operators it wants to describe do not exist. Declaring their schemas first is enough for image and video processors.
SHIM_MODULE = '''"""Written by score-vllm's set-up: lets a CUDA-linked torchvision import beside a CPU torch."""

import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._score_vllm_torchvision_schemas = library  # the declaration lives as long as this object
        return None


sys.meta_path.insert(0, _Finder())
'''


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def run(*command: str | Path, **kwargs) -> None:
    subprocess.run([str(part) for part in command], check=True, **kwargs)


def run_with_heartbeat(*command: str | Path, env: dict[str, str]) -> None:
    """Run a long, quiet command; say every half minute that it is still going."""
    start = time.monotonic()
    with subprocess.Popen([str(part) for part in command], env=env) as process:
        while True:
            try:
                code = process.wait(30)
                break
            except subprocess.TimeoutExpired:
                say(f"... still installing, {time.monotonic() - start:.0f} s")
    if code:
        raise subprocess.CalledProcessError(code, command)


def imports(module: str) -> bool:
    """True where the environment's Python imports the module without an error."""
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def find_python() -> str:
    """A working interpreter of a supported version; some names on PATH are shims that do not run."""
    check = f"import sys; sys.exit(0 if sys.version_info >= {MINIMUM} else 1)"
    for name in (sys.executable, *CANDIDATES):
        path = shutil.which(name) if name else None
        if path and subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
            return path
    sys.exit(f"[setup] Python >= {'.'.join(map(str, MINIMUM))} is needed and none was found on PATH")


def reachable(url: str) -> bool:
    """True where the URL answers within a few seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def has_nvidia_gpu() -> bool:
    """True where nvidia-smi lists at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def fingerprint(extra: str) -> str:
    """Changes when what would be installed changes."""
    digest = hashlib.sha256(f"{extra} {ROOT}".encode())
    for name in ("pyproject.toml", "scripts/setup_env.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def repair_cpu_torchvision(cpu_index: bool) -> None:
    """Make ``import torchvision`` work beside a CPU torch, only where it does not already."""
    if imports("torchvision"):
        return
    version = (installed("torchvision") or "").split("+")[0]
    if cpu_index and version:
        say(f"torchvision does not import; trying its CPU build from {TORCH_CPU_INDEX}")
        command = [PYTHON, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall"]
        subprocess.run([*command, f"torchvision=={version}+cpu", "--index-url", TORCH_CPU_INDEX])
        if imports("torchvision"):
            return
    say("torchvision is linked against CUDA; declaring the two operator schemas that it lacks")
    site = Path(
        subprocess.run(
            [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    (site / "_score_vllm_torchvision_shim.py").write_text(SHIM_MODULE)
    (site / "_score_vllm_torchvision_shim.pth").write_text("import _score_vllm_torchvision_shim\n")
    if not imports("torchvision"):
        sys.exit("[setup] torchvision still does not import; see: .venv/bin/python -c 'import torchvision'")


def remove_broken(*distributions: str) -> None:
    """Uninstall optional packages that are present but cannot be imported; vLLM probes for them."""
    for name in distributions:
        if installed(name) and not imports(name):
            say(f"removing {name}: it is linked against CUDA and does not import here; nothing of ours needs it")
            run(PYTHON, "-m", "pip", "uninstall", "-q", "-y", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", choices=["cpu", "cuda"])
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    extra = args.extra or ("cuda" if has_nvidia_gpu() else "cpu")
    mark = fingerprint(extra)

    VENV.mkdir(exist_ok=True)
    with open(VENV / "score-setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second waits and finds the stamp
        if not args.force and STAMP.exists() and STAMP.read_text() == mark and PYTHON.exists():
            say("environment is up to date")
            return
        STAMP.unlink(missing_ok=True)
        if not PYTHON.exists():
            base = find_python()
            say(f"making .venv with {base}")
            run(base, "-m", "venv", VENV)
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        index: list[str] = []
        cpu_index = extra == "cpu" and reachable(f"{TORCH_CPU_INDEX}/")
        if cpu_index:
            index = ["--extra-index-url", TORCH_CPU_INDEX]
        say(f"installing score-vllm[{extra},decord,bench,train,dev,docs] (the first time takes a few minutes)")
        target = f"{ROOT}[{extra},decord,bench,train,dev,docs]"
        run_with_heartbeat(PYTHON, "-m", "pip", "install", "-q", *index, "-e", target, env=environment)
        if extra == "cpu":
            repair_cpu_torchvision(cpu_index)
            remove_broken("torchaudio", "torchcodec")
        run(PYTHON, "-c", "import score_vllm, torchvision, vllm", stdout=subprocess.DEVNULL)
        partial = STAMP.with_suffix(".partial")
        partial.write_text(mark)
        partial.replace(STAMP)
    say("done: .venv/bin/score-serve and .venv/bin/python are ready")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"[setup] failed: {' '.join(map(str, error.cmd))}")
