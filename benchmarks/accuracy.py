"""Accuracy with and without compression.

    python benchmarks/accuracy.py --benchmark world ...        made videos with known answers, on this machine
    python benchmarks/accuracy.py --benchmark footage ...      real footage with known answers, on this machine
    python benchmarks/accuracy.py --benchmark videomme ...     Video-MME, MLVU or LVBench, against an endpoint

Each benchmark has options of its own: add --help to see them. The public sets are described in docs/evaluating.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Each module has ``add_arguments(parser)`` and ``main(args)``.
MODULES = {"world": "benchmarks.world.accuracy", "footage": "benchmarks.world.footage"} | dict.fromkeys(
    ("videomme", "mlvu", "lvbench"), "benchmarks.public.run"
)
DEFAULT = "world"


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose the benchmark, then read its own options; returns the exit status."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--benchmark", choices=MODULES, help=f"default: {DEFAULT}")
    chosen, rest = first.parse_known_args(arguments)
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "parents": [first], "allow_abbrev": False}
    if chosen.benchmark is None and rest in (["-h"], ["--help"]):
        argparse.ArgumentParser(description=__doc__, **style).parse_args(rest)
    benchmark = chosen.benchmark or DEFAULT
    try:
        module = importlib.import_module(MODULES[benchmark])
    except ModuleNotFoundError as error:
        sys.exit(f"error: --benchmark {benchmark} needs the package {error.name!r}: pip install 'score-vllm[bench]'")
    parser = argparse.ArgumentParser(description=module.__doc__, **style)
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.benchmark = benchmark
    return module.main(args) or 0


if __name__ == "__main__":
    sys.exit(main())
