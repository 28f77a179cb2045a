"""Accuracy with and without compression.

    python benchmarks/accuracy.py --benchmark world ...        made videos with known answers, on this machine
    python benchmarks/accuracy.py --benchmark videomme ...     Video-MME, MLVU or LVBench, against an endpoint

Each benchmark has options of its own: add --help to see them. The public sets are described in docs/evaluating.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parent.parent))

MODULES = {
    "world": "accuracy_world",
    "videomme": "benchmarks.public.run",
    "mlvu": "benchmarks.public.run",
    "lvbench": "benchmarks.public.run",
}
DEFAULT = "world"


def load(benchmark: str) -> ModuleType:
    """The module with a benchmark's ``add_arguments(parser)`` and ``main(args)``.

    Raises:
        SystemExit: this checkout does not have it, or a package that it needs.
    """
    name = MODULES[benchmark]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            others = ", ".join(key for key, value in MODULES.items() if value != name)
            sys.exit(
                f"error: --benchmark {benchmark} needs benchmarks/{name}.py, which this checkout does not have; "
                f"others: {others}"
            )
        sys.exit(f"error: --benchmark {benchmark} needs the package {error.name!r}: pip install 'score-vllm[bench]'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose the benchmark, then read its own options; returns the exit status."""
    door = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    door.add_argument("--benchmark", choices=MODULES, help=f"default: {DEFAULT}")
    chosen, rest = door.parse_known_args(arguments)
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "parents": [door], "allow_abbrev": False}
    if chosen.benchmark is None and rest in (["-h"], ["--help"]):
        argparse.ArgumentParser(description=__doc__, **style).parse_args(rest)
    benchmark = chosen.benchmark or DEFAULT
    module = load(benchmark)
    parser = argparse.ArgumentParser(description=getattr(module, "DESCRIPTION", None) or module.__doc__, **style)
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.benchmark = benchmark
    return module.main(args) or 0


if __name__ == "__main__":
    sys.exit(main())
