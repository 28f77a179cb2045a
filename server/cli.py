"""``score-serve``: vLLM's OpenAI-compatible server with SCORE compression switched on."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import Any

from score_vllm import methods
from score_vllm.budget import check_retention_ratio
from score_vllm.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES
from score_vllm.server.options import (
    LOADERS,
    SHORT_NAMES,
    TRAINING_FREE_METHOD,
    UsageError,
    check_plugins,
    configure,
)


def build_parser() -> Any:
    """vLLM's own server parser with our group in front."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="score-serve",
        description="vLLM's OpenAI-compatible server; videos reach the language model with a fraction of their tokens.",
        epilog="Every option of vLLM's own server is accepted too: score-serve --help=all lists them.",
    )
    group = parser.add_argument_group(
        "SCORE", "--model takes a hub id, a directory, 'demo', or a short name: " + ", ".join(SHORT_NAMES)
    )
    group.add_argument(
        "--retention",
        type=_ratio,
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
        "--max-frames",
        type=_positive_int,
        default=None,
        metavar="N",
        help=f"most frames read from a video (default: {DEFAULT_MAX_FRAMES})",
    )
    group.add_argument(
        "--fps",
        type=_positive_float,
        default=None,
        metavar="RATE",
        help=f"frames per second read from a video, as far as --max-frames allows (default: {DEFAULT_FPS:g})",
    )
    group.add_argument(
        "--video-loader",
        choices=sorted(LOADERS),
        default="pyav",
        help="who decodes videos; 'vllm' leaves the choice to vLLM and its media-io-kwargs (default: %(default)s)",
    )
    return make_arg_parser(parser)


def _ratio(text: str) -> float:
    try:
        return check_retention_ratio(float(text), "--retention")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}") from None


def _method_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in methods.names()]:
        raise argparse.ArgumentTypeError(f"must be names out of {methods.names()}, got {unknown}")
    return names


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 240:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 240], got {text!r}")
    return value


def banner(args: argparse.Namespace) -> str:
    """What is printed once the server answers: its URL and a line to paste into a shell."""
    scheme = "https" if args.ssl_certfile else "http"
    base_url = f"{scheme}://{args.host or '127.0.0.1'}:{args.port}"
    url = f"file://{args.score_clip}" if args.score_clip else "https://example.com/clip.mp4"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    body = {
        "model": args.served_model_name[0],
        "messages": [{"role": "user", "content": content}],
        "retention_ratio": args.retention,
        "max_tokens": 32,
    }
    curl = f"curl -s {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    return f"\nscore-serve: ready at {base_url}/v1 - try:\n\n{curl}\n\n"


def main(argv: list[str] | None = None) -> None:
    """Console entry point."""
    try:
        check_plugins()
        args = build_parser().parse_args(argv)
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

        validate_parsed_serve_args(args)
        warning = configure(args)
    except UsageError as error:
        sys.exit(f"score-serve: error: {error}")
    args.score_banner = banner(args) if args.uds is None else None
    serving = args.hf_overrides["score"]
    if warning:
        print(f"score-serve: warning: {warning}", file=sys.stderr, flush=True)
    print(
        f"score-serve: {args.served_model_name[0]} with method '{serving['method']}' "
        f"at retention {serving['retention_ratio']:g}; loading ...",
        flush=True,
    )
    cli_env_setup()
    try:
        ServeSubcommand.cmd(args)
    finally:
        shutil.rmtree(serving["stats_dir"], ignore_errors=True)


if __name__ == "__main__":
    main()
