"""The half of ``score-serve doctor`` that runs in a process of its own, started as vLLM starts its workers."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

from score_vllm import plugin
from score_vllm.compatibility import untested

GIB = 1 << 30
Found = dict[str, str]


def run(pipe: Connection, argv: list[str], loud: bool) -> None:
    """Send findings, one by one.

    Args:
        pipe: where they go.
        argv: the command line of the server.
        loud: whether what libraries print may be seen.
    """
    # Findings alone go to standard output.
    if loud:
        os.dup2(2, 1)
    else:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    checks: dict[str, Callable[[], Iterator[Found]]] = {
        "plug-in": check_plugin,
        "device": check_device,
        "server": partial(check_server, argv),
    }
    for name, check in checks.items():
        try:
            for finding in check():
                pipe.send_bytes(json.dumps(finding).encode())
        except Exception as error:
            broken = _error(name, f"{type(error).__name__}: {error}", "report this, with the output of `pip list`")
            pipe.send_bytes(json.dumps(broken).encode())
    pipe.close()


def _ok(name: str, detail: str) -> Found:
    return {"name": name, "state": "ok", "detail": detail, "remedy": ""}


def _warning(name: str, detail: str, remedy: str) -> Found:
    return {"name": name, "state": "warning", "detail": detail, "remedy": remedy}


def _error(name: str, detail: str, remedy: str) -> Found:
    return {"name": name, "state": "error", "detail": detail, "remedy": remedy}


def check_plugin() -> Iterator[Found]:
    """Loaded by vLLM's own means, in a process like its workers; then what the API process needs besides."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if plugin.is_registered():
        yield _ok("plug-in in workers", "vLLM loads it in the processes that it starts")
    else:
        chosen = os.environ.get("VLLM_PLUGINS")
        yield _error(
            "plug-in in workers",
            f"vLLM does not load it in the processes that it starts (VLLM_PLUGINS there: {chosen!r})",
            "let VLLM_PLUGINS contain score in every process: look at sitecustomize, wrappers and Ray's runtime_env",
        )
    from score_vllm.catalog import UsageError
    from score_vllm.server import options

    try:
        options.check_plugins()
        yield _ok("plug-in in API processes", "routes, metrics and the models' classes import")
    except UsageError as error:
        yield _error("plug-in in API processes", str(error), "install score-vllm again (make setup)")


def check_device() -> Iterator[Found]:
    """GPU, Triton, and which kernels select tokens: they run once, on a small video."""
    import platform
    import shutil

    import torch
    from vllm.platforms import current_platform

    name = str(current_platform.device_type)
    if name == "cpu" and shutil.which("nvidia-smi"):
        remedy = "install score-vllm[cuda] instead of score-vllm[cpu]"
        yield _warning("device", "nvidia-smi is here, but the installed vLLM runs on the CPU", remedy)
    elif name == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        yield _ok("device", f"{text}, CUDA {torch.version.cuda}")
    elif name == "cpu":
        yield _ok("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    else:
        remedy = "install a driver that fits torch's CUDA, or score-vllm[cpu]"
        yield _error("device", f"vLLM's platform is {name!r}, and torch finds no NVIDIA GPU", remedy)
        return
    versions = plugin.installed_version(), metadata.version("transformers"), platform.python_version()
    if untested(*versions) is None and (reason := untested(*versions, platform=name)) is not None:
        yield _warning("platform", reason, "try the model with your own videos before you rely on it")
    yield check_kernels(torch.device("cuda" if name == "cuda" else "cpu"))


def check_kernels(device: Any) -> Found:
    """Selection on a video of a few tokens, and which backend it took."""
    import torch

    from score_vllm import RetentionPolicy
    from score_vllm.kernels import ops
    from score_vllm.layout import grid_layout
    from score_vllm.types import VideoGrid

    policy = RetentionPolicy(128)
    dtype = torch.bfloat16
    w_in, b_in, w_out, b_out = (p.detach().to(device) for p in (policy.w_in, policy.b_in, policy.w_out, policy.b_out))
    weights = ops.pack_weights(w_in, b_in, w_out, b_out, dtype)
    table = ops.PositionTable.from_layout(grid_layout(VideoGrid(4, 4, 4), 1.0))
    x = torch.randn(4, 16, 128, device=device, dtype=dtype)
    selected = ops.select_rows(x, weights, 6, table, width=128)
    backend = ops.last_backend("select_rows")
    if tuple(selected.indices.shape) != (6,) or bool(selected.has_nan):
        return _error("kernels", f"{backend} kernels gave a wrong selection", "report this with `pip list` and the GPU")
    if device.type == "cuda" and backend != "triton":
        text = "tokens are selected by torch operations: slower than the Triton kernels"
        return _warning("kernels", text, "install triton; it needs compute capability 8.0 (Ampere) or newer")
    if backend == "triton":
        return _ok("kernels", f"Triton {metadata.version('triton')} kernels select tokens on the GPU")
    return _ok("kernels", "torch operations select tokens on the CPU (oneDNN products)")


def check_server(argv: list[str]) -> Iterator[Found]:
    """The command line as the server would take it: options, model, policy, and room for the largest video."""
    from score_vllm.catalog import UsageError
    from score_vllm.server.arguments import build_parser
    from score_vllm.server.options import configure

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = build_parser().parse_args(argv)
    except SystemExit:
        lines = said.getvalue().strip().splitlines() or ["it does not parse"]
        yield _error("options", lines[-1], "score-serve --help=all lists every option")
        return
    named = {word.split("=")[0] for word in argv} & {"--model", "--config"}
    if not named and args.model_tag is None:
        yield _warning("model", "none was named: only the machine was checked", "score-serve doctor --model MODEL ...")
        return
    args.port = 0  # checked before, and free for this process
    try:
        warning = configure(args)
    except UsageError as error:
        yield _error("options", str(error), "change the option that is named")
        return
    serving = args.hf_overrides["score"]
    text = f"{args.model}: method {serving['method']} at retention {serving['retention_ratio']:g}"
    if warning:
        yield _warning("model", text, warning)
    else:
        yield _ok("model", text)
    if serving["policy"]:
        yield from check_policy(serving["policy"], serving["policy_digest"])
    yield from check_memory(args)


def check_policy(directory: str, digest: str) -> Iterator[Found]:
    """Which one; that it fits the model has been checked with the options."""
    from score_vllm.config import FIRST_ARCHITECTURE
    from score_vllm.policy import RetentionPolicy

    config = RetentionPolicy.from_pretrained(directory).config
    architecture = config.architecture or FIRST_ARCHITECTURE
    text = f"{directory}, architecture {architecture}, hidden size {config.hidden_size}"
    yield _ok("policy", f"{text}, digest {digest[:16]}")


def check_memory(args: Any) -> Iterator[Found]:
    """Free memory against the largest video that the flags admit."""
    import psutil
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from score_vllm.catalog import UsageError
    from score_vllm.config import cell_cache_bytes
    from score_vllm.plan import ModelShape, Plan

    config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    limit = MULTIMODAL_REGISTRY.create_processor(config).info.video_limit
    video = f"largest video {limit.max_frames} frames of {limit.width} x {limit.height}: {limit.tokens:,} visual tokens"
    host = psutil.virtual_memory().available / GIB
    # The dummy video of the start-up, as bytes and as floats.
    needed = 5 * 3 * limit.max_frames * limit.width * limit.height / GIB
    smaller = "lower --max-frames or --max-pixels"
    if host < needed:
        yield _error("host memory", f"{video}; {needed:.1f} GiB needed at start-up, {host:.1f} GiB free", smaller)
    else:
        yield _ok("host memory", f"{video}; {needed:.1f} GiB needed at start-up, {host:.1f} GiB free")
    try:
        shape = ModelShape.from_model(args.model)
    except UsageError as error:
        yield _warning("model memory", str(error), "watch the server's own log of its KV cache")
        return
    cuda = torch.cuda.is_available()
    free, memory = map(float, torch.cuda.mem_get_info()) if cuda else (host * GIB,) * 2
    cache = cell_cache_bytes(args.cell_cache_gib, memory if cuda else None)
    if cuda:
        memory *= args.gpu_memory_utilization
    cells = -(-limit.max_frames // shape.frames_per_cell)
    size = torch.empty((), dtype=config.dtype).element_size()
    plan = Plan(
        shape=shape, frames=limit.max_frames, tokens=limit.tokens // cells, memory=memory, cell_cache=cache,
        gpus=args.tensor_parallel_size, max_model_len=config.max_model_len, weight_bytes=size, value_bytes=size,
        reserve=2 * GIB if cuda else 0.0,
    )  # fmt: skip
    needed = sum(plan.parts.values())
    parts = ", ".join(f"{name} {part / GIB:.2f}" for name, part in plan.parts.items())
    where = "GPU" if cuda else "host"
    text = f"{needed / GIB:.2f} GiB of the {where}'s {memory / GIB:.1f} before the KV cache ({parts})"
    if needed >= min(memory, free):
        yield _error("model memory", text, f"{smaller}, or take a larger or further GPU (--tensor-parallel-size)")
    elif cuda and not plan.fits(1.0):
        why = plan.limit(1.0)
        yield _warning("model memory", f"{text}; the largest video at ratio 1 exceeds {why}", f"{smaller} or the ratio")
    else:
        yield _ok("model memory", text)
