"""No page names a script, a make target or an option that is not there."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from functools import cache

import pytest

from tests.pages import BLOCK, FENCED, PAGES, ROOT


def commands() -> list[tuple[str, list[str]]]:
    """Every command of ours on the pages: in fenced blocks, and in prose between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        shell = [m["code"] for m in BLOCK.finditer(text) if m["language"] == "bash"]
        prose = FENCED.sub("", text)
        shell += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        for line in "\n".join(shell).replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):  # a quotation over several lines: not one of our commands
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if len(words) > 1:
                    found.append((page.name, words))
    return found


def program(words: list[str]) -> tuple[str, ...] | None:
    """What names the program in a command, where it is one of ours."""
    name = words[0].rsplit("/", 1)[-1]
    if name in ("score-serve", "score-viz", "score-plan"):
        return (name,)
    if name == "make":
        return ("make", words[1])
    if name == "torchrun" or name.startswith("python"):
        rest = words[1:]
        if "-m" in rest and (module := rest[rest.index("-m") + 1]).split(".")[0] in ("score_vllm", "benchmarks"):
            return ("-m", module)
        script = next((w for w in rest if w.startswith(("benchmarks/", "examples/", "scripts/"))), None)
        if script is None:
            return None
        # Each benchmark of accuracy.py has options of its own.
        chosen = rest.index("--benchmark") if "--benchmark" in rest else None
        return ("file", script) if chosen is None else ("file", script, *rest[chosen : chosen + 2])
    return None


@cache
def options_of(name: tuple[str, ...]) -> str:
    """The help of a program; asked for in this process, so that torch is imported once."""
    argv, path, out = sys.argv, list(sys.path), io.StringIO()
    sys.argv = ["program", *name[2:], "--help"]
    code: object = None
    try:
        with contextlib.redirect_stdout(out):
            if name[0] == "score-serve":
                importlib.import_module("score_vllm.server.arguments").check_early(["--help=all"])
            elif name[0] in ("score-viz", "score-plan"):
                module = {"score-viz": "score_vllm.viz.cli", "score-plan": "score_vllm.plan_cli"}[name[0]]
                importlib.import_module(module).main(["--help"])
            elif name[0] == "file":
                sys.path.insert(0, str((ROOT / name[1]).parent))
                runpy.run_path(str(ROOT / name[1]), run_name="__main__")
            else:
                runpy.run_module(name[1], run_name="__main__", alter_sys=False)
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv, sys.path[:] = argv, path
    assert not code, f"{name}: --help ended with {code}"
    assert "usage:" in out.getvalue().lower(), f"{name} has no help"
    return out.getvalue()


def test_commands_and_their_options_exist() -> None:
    pytest.importorskip("vllm", reason="score-serve's full help is vLLM's")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    ours = [(page, words, name) for page, words in commands() if (name := program(words))]
    assert len({name for _, _, name in ours}) > 10, "the pages name more programs than that"
    wrong = []
    for page, words, name in ours:
        if name[0] == "make":
            wrong += [f"{page}: make {words[1]}"] if words[1] not in targets else []
            continue
        if name[0] == "file" and not (ROOT / name[1]).is_file():
            wrong.append(f"{page}: {name[1]}")
            continue
        start = words.index(name[1]) if len(name) > 1 else 0
        flags = [word.split("=")[0] for word in words[start:] if re.match(r"--?[a-z]", word)]
        wrong += [f"{page}: {shlex.join(words)}: {flag}" for flag in flags if flag not in options_of(name)]
    assert wrong == []
