"""``score-serve``: vLLM's OpenAI-compatible server with SCORE compression switched on."""

from __future__ import annotations

import argparse
import ctypes
import getpass
import json
import os
import signal
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from score_vllm.catalog import DEMO, UsageError
from score_vllm.models.timing import STATS_VARIABLE
from score_vllm.server.arguments import build_parser, check_early
from score_vllm.server.options import check_plugins, configure
from score_vllm.server.supervisor import DRAIN_FILE

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# Addresses that mean "all of them": a client needs one that it can connect to.
WILDCARD_HOSTS = (None, "", "0.0.0.0", "::")
# More than the decoding processes and their queue take together.
MEDIA_THREADS = 128
# vLLM's: names of variables that engines under Ray get, beside its own.
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


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
    page = f"; playground at {base_url}/playground" if args.playground else ""
    return f"\nscore-serve: ready at {base_url}/v1{page} - try:\n\n{curl}\n\n"


def main(argv: list[str] | None = None) -> None:
    """Console entry point."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["doctor"]:
        from score_vllm.server import doctor

        sys.exit(doctor.main(argv[1:]))
    check_early(argv)
    folder = _become_supervised()
    os.environ[STATS_VARIABLE] = str(folder)
    # vLLM and its libraries leave sockets and folders behind when they are killed; not in here.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    prepare_for_ray(os.environ)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    # Threads only wait for the decoding processes, whose queue must see every video in order to refuse one too many.
    os.environ.setdefault("VLLM_MEDIA_LOADING_THREAD_COUNT", str(MEDIA_THREADS))
    serve(argv, folder)


def prepare_for_ray(environment: MutableMapping[str, str]) -> None:
    """Ray finds the machine's cluster by a file in the temporary folder that everybody has, not in ours; engines that
    it starts are told where the metrics of workers go."""
    environment.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    copied = environment.get(RAY_COPIES, "")
    environment[RAY_COPIES] = ",".join(filter(None, [copied, STATS_VARIABLE]))


def _become_supervised() -> Path:
    """Fork: the child returns and becomes the server, in a folder for everything temporary; this process, with the id
    that the user knows, becomes the supervisor (:mod:`score_vllm.server.supervisor`) and never returns."""
    # The path of a socket may have 107 bytes, and vLLM's sockets have names of 36.
    short = len(tempfile.gettempdir()) <= 40 or not os.access("/tmp", os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="score-serve-", dir=None if short else "/tmp"))
    stop = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # Held back until somebody is there to act on them: the supervisor polls for them, the child takes them as ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*stop, signal.SIGCHLD))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child:
        script = Path(__file__).with_name("supervisor.py")
        os.execv(sys.executable, [sys.executable, "-I", str(script), str(child), str(folder)])
    # Ctrl-C reaches the supervisor only; should that be killed, so is the server.
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*stop, signal.SIGCHLD))
    if os.getppid() != parent:
        sys.exit(1)
    return folder


def serve(argv: list[str], folder: Path) -> None:
    """The server itself.

    Args:
        argv: the command line.
        folder: for everything temporary.
    """
    if DEMO in argv or f"--model={DEMO}" in argv:
        # A newcomer's first start: the server's own lines, not a hundred of the engine's.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        check_plugins()
        args = build_parser().parse_args(argv)
        from vllm.entrypoints.cli.serve import ServeSubcommand

        try:
            from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
            from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        except ImportError:  # vLLM 0.33
            from vllm.entrypoints.common.cli_args import validate_parsed_serve_args
            from vllm.entrypoints.common.startup import cli_env_setup

        validate_parsed_serve_args(args)
        warning = configure(args)
    except UsageError as error:
        sys.exit(f"score-serve: error: {error}")
    (folder / DRAIN_FILE).write_text(str(args.shutdown_timeout))
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
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
