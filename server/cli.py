"""``score-serve``: vLLM's OpenAI-compatible server with SCORE compression switched on."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from score_vllm import methods, plugin
from score_vllm.budget import check_retention_ratio
from score_vllm.config import ServingConfig
from score_vllm.demo import ensure_demo, ensure_demo_clip
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES

SHORT_NAMES = {f"Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")}
DEMO = "demo"
TRAINING_FREE_METHOD = "uniform"
TRAIN_COMMAND = "python -m score_vllm.train --config train/configs/qwen2_5_vl_7b.toml"
# Groups whose plug-ins vLLM loads unless VLLM_PLUGINS is set; setting it must not switch them off.
DEFAULT_ON_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
LOADERS = {"pyav": "score_pyav", "decord": "score_decord", "vllm": None}
MAX_DOWNLOAD_BYTES = 1 << 30


class UsageError(Exception):
    """An operator's mistake; its message is the one sentence that is printed."""


@dataclass(frozen=True)
class ResolvedModel:
    """What ``--model`` stands for."""

    path: str
    served_names: list[str]
    demo_policy: str | None = None
    demo_clip: Path | None = None


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


def resolve_model(name: str) -> ResolvedModel:
    """Turn ``demo`` and short names into what vLLM loads; the typed name stays usable in requests."""
    if name == DEMO:
        model, policy = ensure_demo()
        return ResolvedModel(str(model), [DEMO], str(policy), ensure_demo_clip(model.parent))
    if name in SHORT_NAMES:
        return ResolvedModel(SHORT_NAMES[name], [name, SHORT_NAMES[name]])
    if looks_short := [known for known in SHORT_NAMES if known.lower() == name.lower()]:
        raise UsageError(f"--model {name!r} is not known; did you mean {looks_short[0]!r}?")
    return ResolvedModel(name, [name])


def choose_method(method: str | None, policy: str | None) -> tuple[str, str | None]:
    """Which method runs; ``(method, warning)``.

    Raises:
        UsageError: ``score`` was asked for by name and there is no policy, or a policy and another method.
    """
    if policy is not None:
        if method not in (None, "score"):
            raise UsageError(f"--policy belongs to --method score, but --method {method} was given; drop one of them")
        return "score", None
    if method == "score":
        raise UsageError(f"--method score needs --policy DIR; train one with: {TRAIN_COMMAND}")
    if method is not None:
        return method, None
    return TRAINING_FREE_METHOD, (
        f"no retention policy is known for this model, so tokens are selected by the training-free method "
        f"'{TRAINING_FREE_METHOD}', which keeps less of the answer than SCORE; train a policy with: {TRAIN_COMMAND} "
        f"and pass it as --policy DIR"
    )


def check_policy(policy: str, hidden_size: int) -> tuple[str, str]:
    """Load the policy before the engine starts; ``(local directory, digest)``.

    Raises:
        UsageError: it is missing, incomplete, broken or of another hidden size.
    """
    from score_vllm.models.adapter import load_policy
    from score_vllm.policy import resolve_directory

    try:
        directory = str(resolve_directory(policy).resolve())
        return directory, load_policy(directory, hidden_size).digest()
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--policy: {error}") from error


def read_model_config(args: argparse.Namespace) -> tuple[str, int]:
    """``(architecture, hidden size of the language model)`` from the model's own configuration.

    Raises:
        UsageError: it cannot be read, or the architecture is not supported.
    """
    from vllm.transformers_utils.config import get_config

    try:
        config = get_config(args.model, trust_remote_code=args.trust_remote_code, revision=args.revision)
    except Exception as error:  # whatever the hub, the disk or the file made of it
        reason = " ".join(str(error).split())
        raise UsageError(f"--model: cannot read the configuration of {args.model!r}: {reason}") from error
    architecture = (config.architectures or ["none"])[0]
    if architecture not in plugin.ARCHITECTURES:
        known = ", ".join(plugin.ARCHITECTURES)
        raise UsageError(f"--model {args.model!r} is a {architecture}; supported architectures: {known}")
    return architecture, config.get_text_config().hidden_size


def check_plugins() -> None:
    """vLLM logs and swallows plug-in import errors; import ours here, where an error still stops the start.

    Raises:
        UsageError: an entry point is missing or does not import.
    """
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        found = list(entry_points(group=group, name="score"))
        if not found:
            raise UsageError(f"the entry point 'score' of {group} is missing; install score-vllm again (make setup)")
        try:
            found[0].load()
        except Exception as error:
            raise UsageError(f"the plug-in {found[0].value} does not import: {error!r}") from error
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is None:
        names = {point.name for group in DEFAULT_ON_GROUPS for point in entry_points(group=group)}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {"score"}))
    elif "score" not in [name.strip() for name in chosen.split(",")]:
        os.environ["VLLM_PLUGINS"] = f"{chosen},score".lstrip(",")


def check_engine_options(args: argparse.Namespace) -> None:
    """Refuse, in one sentence and before anything loads, what the model class would refuse later.

    Raises:
        UsageError: an option that SCORE cannot be combined with.
    """
    if args.pipeline_parallel_size > 1:
        raise UsageError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size} is not supported: later stages would not see "
            "the positions of kept tokens; use --tensor-parallel-size"
        )
    if args.video_pruning_rate:
        raise UsageError(
            f"--video-pruning-rate {args.video_pruning_rate} is vLLM's own pruning; use --retention instead"
        )
    if args.worker_extension_cls:
        raise UsageError("--worker-extension-cls is taken: score-serve checks its workers through it")
    if getattr(args, "grpc", False):
        raise UsageError("--grpc is not supported: retention_ratio is a field of the HTTP API")


def apply_media_options(args: argparse.Namespace) -> None:
    """Our loader, frame limits and download cap, under what ``--media-io-kwargs`` says."""
    given = dict(args.media_io_kwargs or {})
    video: dict[str, Any] = {}
    if (loader := LOADERS[args.video_loader]) is not None:
        video = {"video_backend": loader, "num_frames": DEFAULT_MAX_FRAMES, "fps": DEFAULT_FPS}
        video["max_bytes"] = MAX_DOWNLOAD_BYTES
    if args.max_frames is not None:
        video["num_frames"] = args.max_frames
    if args.fps is not None:
        video["fps"] = args.fps
    asked = dict(given.get("video", {}))
    if asked.get("video_backend", loader) != loader:
        video.pop("max_bytes", None)  # a key of our loaders
        video.pop("video_backend", None)
    args.media_io_kwargs = {**given, "video": {**video, **asked}}


def apply_demo_defaults(args: argparse.Namespace, model: ResolvedModel) -> None:
    """The demo starts in seconds on a small machine, and may read its own sample clip."""
    assert model.demo_clip is not None
    args.enforce_eager = True
    if not args.allowed_local_media_path:
        args.allowed_local_media_path = str(model.demo_clip.parent)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def configure(args: argparse.Namespace) -> str | None:
    """Fill vLLM's arguments from ours; returns a warning to print, or None.

    Raises:
        UsageError: anything an operator can get wrong.
    """
    if args.model_tag is not None:
        args.model, args.model_tag = args.model_tag, None
    check_engine_options(args)
    model = resolve_model(args.model)
    args.model = model.path
    if args.served_model_name is None:
        args.served_model_name = model.served_names
    if model.demo_clip is not None:
        apply_demo_defaults(args, model)
    policy = args.policy
    if policy is None and args.method in (None, "score"):
        policy = model.demo_policy
    method, warning = choose_method(args.method, policy)
    _, hidden_size = read_model_config(args)
    digest = ""
    if policy is not None:
        policy, digest = check_policy(policy, hidden_size)
    stats = tempfile.mkdtemp(prefix="score-stats-")
    serving = ServingConfig(args.retention, method, policy, digest, stats)
    if not isinstance(args.hf_overrides or {}, dict):
        raise UsageError("--hf-overrides must be a JSON object")
    args.hf_overrides = {**(args.hf_overrides or {}), **serving.to_overrides()}
    args.worker_extension_cls = WORKER_EXTENSION
    apply_media_options(args)
    args.score_clip = model.demo_clip
    args.score_banner = banner(args) if args.uds is None else None
    return warning


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
    import shutil

    stats_dir = None
    try:
        check_plugins()
        parser = build_parser()
        args = parser.parse_args(argv)
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

        validate_parsed_serve_args(args)
        warning = configure(args)
    except UsageError as error:
        sys.exit(f"score-serve: error: {error}")
    serving = args.hf_overrides["score"]
    stats_dir = serving["stats_dir"]
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
        shutil.rmtree(stats_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
