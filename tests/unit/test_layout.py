"""Guards the layout: who may import whom, what the core needs, how the mounted folders are packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOUNTED = [name for name in ("kernels", "server", "train") if (ROOT / name).is_dir()]

# Lower layers first; a module may import from its own layer and from lower ones.
ROOMS = [
    {"architectures", "budget", "client", "compatibility", "types", "config", "files", "layout", "near_miss"},
    {"option_types", "video"},
    {"kernels"},
    {"coverage", "policy", "positions"},
    {"methods", "select", "demo", "vision", "catalog", "plan", "plan_cli"},
    {"viz"},
    {"models"},
    {"convert_llava_video", "plugin", "server", "train", "integrations"},
]
# One job a file; longer ones say in their docstring why they are one file.
MOST_LINES = 310
LONG_FILES = {
    "benchmarks/serving/decode.py",
    "kernels/ops.py",
    "score_vllm/models/adapter.py",
    "score_vllm/models/processing.py",
    "train/config.py",
    "train/data/records.py",
    "train/frozen/model.py",
    "train/world/scenes.py",
}
VLLM_ROOMS = {"models", "server"}
# Single files that may import vllm besides, inside functions.
VLLM_FILES = {"score_vllm/plugin.py", "train/frozen/model.py"}


def room_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "score_vllm" or len(parts) < 2:
        return None
    return next((level for level, names in enumerate(ROOMS) if parts[1] in names), None)


def sources() -> list[Path]:
    own = [
        p
        for p in (ROOT / "score_vllm").rglob("*.py")
        if not any((ROOT / "score_vllm" / m) in p.parents for m in MOUNTED)
    ]
    return own + [p for name in MOUNTED for p in (ROOT / name).rglob("*.py")]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: use absolute imports"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "score_vllm" else ("score_vllm", *relative.parts)
    return ".".join(parts)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    own = room_of(name)
    for imported in imports(path):
        level = room_of(imported)
        if own is not None and level is not None:
            assert level <= own, f"{name} imports {imported}, which lives above it"
        top = imported.split(".")[0]
        assert top not in {"kernels", "server", "train"}, f"{name}: import score_vllm.{top}"
        assert top not in {"benchmarks", "tests"}, f"{name} must not import {top}"
        room = name.split(".")[1] if "." in name else ""
        if top == "vllm":
            assert room in VLLM_ROOMS or str(path.relative_to(ROOT)) in VLLM_FILES, f"{name} must not import vllm"
        if top == "triton":
            assert room == "kernels", f"{name} must not import triton"
    if name.startswith("score_vllm.train"):
        assert not any(i.startswith("score_vllm.server") for i in imports(path))
    if name.startswith("score_vllm.server"):
        assert not any(i.startswith("score_vllm.train") for i in imports(path))


def test_every_module_has_a_room() -> None:
    nowhere = [n for n in map(module_name, sources()) if room_of(n) is None and not n.endswith("__init__")]
    assert nowhere == []


def test_core_imports_without_vllm_and_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = None\nsys.modules['triton'] = None\n"
        "import torch, score_vllm, score_vllm.demo, score_vllm.video\n"
        "x = torch.randn(4, 6, 16)\n"
        "print(score_vllm.select_tokens(x, 0.25, policy=score_vllm.RetentionPolicy(16)).num_retained)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "6", done.stderr


def test_mounted_folders_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    for name in MOUNTED:
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would shadow a public package"
        link = ROOT / "score_vllm" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
        assert project["tool"]["setuptools"]["package-dir"][f"score_vllm.{name}"] == name
    folders = {module_name(p.parent / "x.py").rsplit(".", 1)[0] for p in sources()}
    assert folders == listed


def test_version_is_said_once_and_the_same() -> None:
    import score_vllm

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == score_vllm.__version__


def test_long_files_have_a_reason() -> None:
    own = sources() + [p for name in ("benchmarks", "scripts", "examples") for p in (ROOT / name).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): p.read_text() for p in own if len(p.read_text().splitlines()) > MOST_LINES}
    assert set(long) == LONG_FILES, "split a new one, or give its reason; take a shortened one off the list"
    for path, text in long.items():
        assert "\nOne file" in (ast.get_docstring(ast.parse(text)) or ""), f"{path} does not say why it is one file"


def test_no_pickle_anywhere() -> None:
    for path in sources():
        names = imports(path)
        assert not any(n.split(".")[0] in {"pickle", "dill", "cloudpickle"} for n in names), path
        assert "torch.load(" not in path.read_text(), path
