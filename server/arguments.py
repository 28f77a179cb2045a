"""Our own command-line options, checked before vLLM is imported: a slip costs a second, not a start-up."""

from __future__ import annotations

import argparse
from typing import Any

from score_vllm import methods
from score_vllm.catalog import SHORT_NAMES
from score_vllm.config import MIN_PIXELS
from score_vllm.near_miss import near_miss
from score_vllm.option_types import at_least, cell_cache_gib, retention_ratio
from score_vllm.server.media_options import LOADERS
from score_vllm.server.options import DEFAULT_BODY_MIB, LOCAL_HOSTS, TRAINING_FREE_METHOD
from score_vllm.video.sampling import DEFAULT_CELL_TOKENS, DEFAULT_FPS, DEFAULT_MAX_FRAMES, MAX_FPS

PROG = "score-serve"
USAGE = "score-serve --model MODEL [--retention RATIO] [SCORE options] [options of vLLM's server]"
DESCRIPTION = (
    "vLLM's OpenAI-compatible server; videos reach the language model with a fraction of their tokens. "
    "'score-serve doctor' with the same options checks beforehand whether they work here."
)
LOG_FORMATS = ("text", "json", "none")
MODEL_HELP = "a hub id, a directory, 'demo', or a short name: " + ", ".join(SHORT_NAMES)


def add_options(parser: Any) -> None:
    """Add the SCORE group to a parser."""
    group = parser.add_argument_group("SCORE", f"--model takes {MODEL_HELP}")
    group.add_argument(
        "--retention",
        type=retention_ratio,
        default=0.1,
        metavar="RATIO",
        help="default fraction of each video's tokens to keep, in (0, 1] (default: %(default)s)",
    )
    group.add_argument(
        "--method",
        choices=methods.names(),
        default=None,
        help=f"selection method (default: score where a policy is there, else {TRAINING_FREE_METHOD})",
    )
    group.add_argument(
        "--allow-methods",
        type=_method_names,
        default=(),
        metavar="NAMES",
        help="methods, with commas between, that a request may choose by retention_method (default: none)",
    )
    group.add_argument(
        "--policy",
        default=None,
        metavar="DIR",
        help="retention policy for --method score: a directory or a hub id",
    )
    group.add_argument(
        "--selector",
        action="append",
        default=[],
        metavar="[METHOD=]SOURCE",
        help="trained weights of a learned method other than score: a directory, or a hub id of which the method's own "
        "tensors alone are fetched; may be given once per method",
    )
    group.add_argument(
        "--max-frames",
        type=at_least(1),
        default=None,
        metavar="N",
        help=f"most frames read from a video (default: {DEFAULT_MAX_FRAMES})",
    )
    group.add_argument(
        "--max-pixels",
        type=at_least(MIN_PIXELS),
        default=None,
        metavar="N",
        help="most pixels of a frame, above which it is made smaller; with --max-frames this sizes the memory that is "
        f"reserved for a video (default: {DEFAULT_CELL_TOKENS} visual tokens a cell, which is "
        f"{DEFAULT_CELL_TOKENS * 28 * 28} for Qwen2.5-VL, or the checkpoint's limit where that is lower)",
    )
    group.add_argument(
        "--fps",
        type=_positive_float,
        default=None,
        metavar="RATE",
        help=f"frames per second read from a video, as far as --max-frames allows (default: {DEFAULT_FPS:g})",
    )
    group.add_argument(
        "--cell-cache-gib",
        type=cell_cache_gib,
        default=None,
        metavar="GIB",
        help="memory in which a worker keeps the vision tower's output, so that no temporal cell is encoded twice; 0 "
        "keeps none (default: 1 on a CPU, 4 %% of a GPU's memory)",
    )
    group.add_argument(
        "--playground",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"serve a page to try the model on at /playground (default: where --host is {', '.join(LOCAL_HOSTS)})",
    )
    group.add_argument(
        "--video-loader",
        choices=sorted(LOADERS),
        default="pyav",
        help="who decodes videos; 'vllm' leaves the choice to vLLM and its media-io-kwargs (default: %(default)s)",
    )
    group.add_argument(
        "--max-body-mib",
        type=at_least(1),
        default=DEFAULT_BODY_MIB,
        metavar="N",
        help="largest body of a request in MiB, above which it is refused with 413 (default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="the log's line per request: text, JSON (vLLM's own lines then too), or none (default: %(default)s)",
    )


def check_early(argv: list[str]) -> None:
    """Refuse mistakes in our own options, and print help: ours without importing vLLM, ``--help=...`` from its parser.

    Raises:
        SystemExit: help was asked for (0), or an option is wrong (2).
    """
    parser = argparse.ArgumentParser(PROG, USAGE, DESCRIPTION, add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default=None, help=MODEL_HELP)
    add_options(parser)
    parser.add_argument("-h", "--help", action="store_true", help="this; --help=all adds every option of vLLM's server")
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        raise SystemExit(0)
    if any(word.startswith("--help=") for word in argv):
        build_parser().parse_args(argv)
    known, rest = parser.parse_known_args(argv)
    positional = bool(rest) and not rest[0].startswith("-")
    from_file = any(word == "--config" or word.startswith("--config=") for word in rest)
    if known.model is None and not positional and not from_file:
        parser.error(f"--model is required: {MODEL_HELP}")


def build_parser() -> Any:
    """vLLM's own server parser with our group in front."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            words = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
            for word in words:
                if hint := near_miss(word.split("=")[0], self._option_string_actions):
                    message += hint
                    break
            super().error(message)

    parser = Parser(prog=PROG, usage=USAGE, description=DESCRIPTION)
    add_options(parser)
    return make_arg_parser(parser)


def _method_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in methods.names()]:
        raise argparse.ArgumentTypeError(f"must be names out of {methods.names()}, got {unknown}")
    return names


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_FPS:
        raise argparse.ArgumentTypeError(f"must be a number in (0, {MAX_FPS}], got {text!r}")
    return value
