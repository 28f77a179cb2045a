"""``score-selector``: copies the trained tensors of a learned method out of a checkpoint, for use without a network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from score_vllm import methods
from score_vllm.methods import hub


def build_parser() -> argparse.ArgumentParser:
    """Command line of ``score-selector``."""
    parser = argparse.ArgumentParser(prog="score-selector", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch the tensors of a hub repository into a directory")
    fetch.add_argument("repo", help="hub id, owner/name")
    fetch.add_argument("directory", type=Path, help="made where it does not exist")
    fetch.add_argument(
        "--method", default="visionselector", choices=methods.learned_names(), help="(default: %(default)s)"
    )
    fetch.add_argument("--revision", default=None, help="branch, tag or commit (default: the default branch)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Console entry point; exit code 1 where the weights cannot be had or are broken."""
    args = build_parser().parse_args(argv)
    weights = methods.get(args.method).weights
    assert weights is not None
    if not hub.is_hub_id(args.repo):
        sys.exit(f"score-selector: error: repo must be a hub id, owner/name, got {args.repo!r}")
    try:
        directory = hub.fetch(args.repo, args.directory, weights.wanted, args.revision)
        learned = weights.load(str(directory))
    except (OSError, ValueError) as error:
        sys.exit(f"score-selector: error: {error}")
    print(f"score-selector: {directory}: {args.method}, hidden size {learned.hidden_size}, digest {learned.digest()}")
