"""``score-serve``: vLLM's OpenAI-compatible server with SCORE compression switched on."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile

from score_vllm.catalog import DEMO, UsageError
from score_vllm.models.timing import STATS_VARIABLE
from score_vllm.server.arguments import build_parser, check_early
from score_vllm.server.options import check_plugins, configure

# Addresses that mean "all of them": a client needs one that it can connect to.
WILDCARD_HOSTS = (None, "", "0.0.0.0", "::")
# More than the decoding processes and their queue take together.
MEDIA_THREADS = 128


def banner(args: argparse.Namespace) -> str:
    """What is printed once the server answers: its URL and a line to paste into a shell."""
    scheme = "https" if args.ssl_certfile else "http"
    host = "127.0.0.1" if args.host in WILDCARD_HOSTS else args.host
    base_url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"
    url = f"file://{args.score_clip}" if args.score_clip else "https://example.com/your-clip.mp4"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What happens?"}]
    body = {
        "model": args.served_model_name[0],
        "messages": [{"role": "user", "content": content}],
        "retention_ratio": args.retention,
        "max_tokens": 64,
        "temperature": 0,
    }
    curl = f"curl -s {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    return f"\nscore-serve: ready at {base_url}/v1 - try:\n\n{curl}\n\n"


def main(argv: list[str] | None = None) -> None:
    """Console entry point."""
    argv = sys.argv[1:] if argv is None else argv
    check_early(argv)
    # Threads only wait for the decoding processes, whose queue must see every video in order to refuse one too many.
    os.environ.setdefault("VLLM_MEDIA_LOADING_THREAD_COUNT", str(MEDIA_THREADS))
    if DEMO in argv or f"--model={DEMO}" in argv:
        # A newcomer's first start: the server's own lines, not a hundred of the engine's.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory(prefix="score-stats-", ignore_cleanup_errors=True) as stats_dir:
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
        os.environ[STATS_VARIABLE] = stats_dir
        cli_env_setup()
        ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
