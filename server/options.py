"""Fills vLLM's arguments from score-serve's options; refuses what cannot work, in one sentence."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from importlib.metadata import entry_points

from score_vllm import methods, plugin
from score_vllm.architectures import BY_NAME, REFUSED, Architecture
from score_vllm.catalog import TRAIN_COMMAND, TRAINING_FREE_METHOD, ResolvedModel, UsageError, resolve_model
from score_vllm.config import SPECULATIVE_METHODS, ServingConfig
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.server.media_options import apply_media_options
from score_vllm.server.selectors import resolve_selectors

# Groups whose plug-ins vLLM loads unless VLLM_PLUGINS is set; setting it must not switch them off.
DEFAULT_ON_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
# A video of 380 MB as a data URL. Such a body is held several times over while it is parsed and decoded.
DEFAULT_BODY_MIB = 512
# The playground is served there unless it is switched off.
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def choose_method(method: str | None, policy: str | None, allowed: tuple[str, ...] = ()) -> tuple[str, str | None]:
    """Which method runs; ``(method, warning)``.

    Raises:
        UsageError: ``score`` was asked for by name and there is no policy, or a policy that no method uses.
    """
    if policy is not None:
        if "score" not in (method or "score", *allowed):
            raise UsageError(f"--policy belongs to --method score, but --method {method} was given; drop one of them")
        return method or "score", None
    if "score" in (method, *allowed):
        raise UsageError(f"method score needs --policy DIR; train one with: {TRAIN_COMMAND}")
    if method is not None:
        return method, None
    return TRAINING_FREE_METHOD, (
        f"no retention policy is known for this model, so tokens are selected by the training-free method "
        f"'{TRAINING_FREE_METHOD}'; train a policy with: {TRAIN_COMMAND} and pass it as --policy DIR"
    )


def check_policy(policy: str, hidden_size: int, architecture: str) -> tuple[str, str]:
    """Load the policy before the engine starts; ``(local directory, digest)``.

    Raises:
        UsageError: it is missing, incomplete, broken, or made for another hidden size or architecture.
    """
    from score_vllm.models.adapter import load_policy
    from score_vllm.policy import resolve_directory

    try:
        directory = str(resolve_directory(policy).resolve())
        return directory, load_policy(directory, hidden_size, architecture).digest()
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--policy: {error}") from error


def check_refused(model: str, architecture: str) -> None:
    """Refuse, with the reason, what users ask for and cannot have.

    Raises:
        UsageError: the architecture is one of those.
    """
    if architecture in REFUSED:
        raise UsageError(f"--model {model!r} is a {architecture}, which is not supported: {REFUSED[architecture]}")


def read_model(args: argparse.Namespace) -> tuple[Architecture, int]:
    """Architecture, and hidden size of the language model, from the model's own configuration.

    Raises:
        UsageError: it cannot be read, or the architecture is not supported.
    """
    from transformers import PreTrainedConfig
    from vllm.transformers_utils.config import get_config

    try:
        config = get_config(args.model, trust_remote_code=args.trust_remote_code, revision=args.revision)
    except Exception as error:  # whatever the hub, the disk or the file made of it
        # Transformers cannot read some of the checkpoints that are refused with a reason.
        with contextlib.suppress(OSError, ValueError):
            raw, _ = PreTrainedConfig.get_config_dict(args.model, revision=args.revision)
            check_refused(args.model, (raw.get("architectures") or ["none"])[0])
        reason = " ".join(str(error).split())
        raise UsageError(f"--model: cannot read the configuration of {args.model!r}: {reason}") from error
    architecture = (config.architectures or ["none"])[0]
    check_refused(args.model, architecture)
    if architecture not in BY_NAME:
        known = ", ".join(BY_NAME)
        raise UsageError(f"--model {args.model!r} is a {architecture}; supported architectures: {known}")
    return BY_NAME[architecture], int(config.get_text_config().hidden_size)


def check_plugins() -> None:
    """vLLM logs and swallows plug-in import errors; import ours here, where an error still stops the start.

    Raises:
        UsageError: an entry point is missing or does not import, or vLLM is an untested version.
    """
    try:
        plugin.check_version()
    except plugin.UntestedVersionError as error:
        raise UsageError(str(error)) from error
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        found = list(entry_points(group=group, name="score"))
        if not found:
            raise UsageError(f"the entry point 'score' of {group} is missing; install score-vllm again (make setup)")
        try:
            found[0].load()
        except Exception as error:
            raise UsageError(f"the plug-in {found[0].value} does not import: {error!r}") from error
    allow_plugin()


def allow_plugin() -> None:
    """Put ``score`` among ``VLLM_PLUGINS``, which every process of the server inherits."""
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
    if args.enable_dbo:
        raise UsageError("--enable-dbo is not supported: micro-batches would lose the positions of kept tokens")
    if args.enable_tower_connector_lora:
        raise UsageError("--enable-tower-connector-lora is not supported: vLLM sizes its adapters by kept tokens")
    speculative = dict(args.speculative_config or {}).get("method")
    if args.speculative_config and speculative not in SPECULATIVE_METHODS:
        raise UsageError(
            f"--speculative-config with method {speculative!r} is not supported: a draft model would read uncompressed "
            "positions; use 'ngram' or 'suffix'"
        )
    if args.worker_extension_cls:
        raise UsageError("--worker-extension-cls is taken: score-serve checks its workers through it")
    if getattr(args, "grpc", False):
        raise UsageError("--grpc is not supported: retention_ratio is a field of the HTTP API")


def check_attention(args: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Refuse methods that rank by the tower's attention where it cannot be seen.

    Raises:
        UsageError: one of the chosen methods is such a one, and the tower is data-parallel or compiled.
    """
    if not any(methods.get(name).saliency for name in chosen):
        return
    from score_vllm.models.saliency import check_saliency_options

    try:
        check_saliency_options(args.mm_encoder_tp_mode, args.compilation_config)
    except ValueError as error:
        raise UsageError(f"--method, --allow-methods: {error}") from error


def apply_scheduler_options(args: argparse.Namespace) -> None:
    """The scheduler charges videos by what is encoded, unless the operator names an encoder cache manager."""
    from vllm.config import EncoderCacheManagerConfig

    if args.ec_manager_config.encoder_cache_manager_cls is None:
        args.ec_manager_config = EncoderCacheManagerConfig(encoder_cache_manager_cls=plugin.ENCODER_CACHE_MANAGER)


def apply_logging(args: argparse.Namespace) -> None:
    """``--log-format json`` is for every line; what the operator says of vLLM's own stays."""
    if args.log_format == "json" and getattr(args, "logging_config", None) is None:
        from vllm.config.logging import LoggingConfig

        args.logging_config = LoggingConfig(formatter="json")


def apply_demo_defaults(args: argparse.Namespace, model: ResolvedModel) -> None:
    """The demo starts in seconds on a small machine, and may read its own sample clip."""
    assert model.demo_clip is not None
    args.enforce_eager = True
    if not args.allowed_local_media_path:
        args.allowed_local_media_path = str(model.demo_clip.parent)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def check_port(args: argparse.Namespace) -> None:
    """Say now, not after loading, that the server cannot listen there.

    Raises:
        UsageError: another process does, or the port or the host is none.
    """
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port must be an integer in [0, 65535], got {args.port}; choose another --port")
    if args.uds is not None or args.port == 0:
        return
    family = socket.AF_INET6 if ":" in (args.host or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host or "", args.port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(
                    f"--host {args.host!r} is no address of this machine: {error.strerror}; choose another --host"
                ) from error
            raise UsageError(f"--port {args.port} cannot be used: {error.strerror}; choose another --port") from error


def configure(args: argparse.Namespace) -> str | None:
    """Fill vLLM's arguments from ours; returns a warning to print, or None.

    Raises:
        UsageError: anything an operator can get wrong.
    """
    if args.model_tag is not None:
        args.model, args.model_tag = args.model_tag, None
    check_engine_options(args)
    check_port(args)
    model = resolve_model(args.model)
    args.model = model.path
    if args.served_model_name is None:
        args.served_model_name = model.served_names
    if model.demo_clip is not None:
        apply_demo_defaults(args, model)
    policy = args.policy
    if policy is None and (args.method in (None, "score") or "score" in args.allow_methods):
        policy = model.demo_policy
    method, warning = choose_method(args.method, policy, args.allow_methods)
    architecture, hidden_size = read_model(args)
    digest = ""
    if policy is not None:
        policy, digest = check_policy(policy, hidden_size, architecture.name)
    frames = apply_media_options(args, architecture)
    chosen = (method, *(name for name in args.allow_methods if name != method))
    check_attention(args, chosen)
    selectors = resolve_selectors(args.selector, chosen, hidden_size, architecture.name)
    serving = ServingConfig(
        args.retention,
        method,
        args.allow_methods,
        policy,
        digest,
        frames,
        args.max_pixels,
        *selectors,
        cell_cache_gib=args.cell_cache_gib,
    )
    if not isinstance(args.hf_overrides or {}, dict):
        raise UsageError("--hf-overrides must be a JSON object")
    args.hf_overrides = {**(args.hf_overrides or {}), **serving.to_overrides()}
    args.worker_extension_cls = WORKER_EXTENSION
    apply_scheduler_options(args)
    apply_logging(args)
    args.score_clip = model.demo_clip
    if args.playground is None:
        args.playground = args.host in LOCAL_HOSTS
    return warning
