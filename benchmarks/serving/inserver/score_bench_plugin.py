"""A vLLM plug-in for benchmarks only, loaded into every process of a server that :mod:`serving` starts.

It does two things. It registers score-vllm's video loaders, so that a vanilla server (vLLM's own model class and
processor) reads the same frames as a compressed one. And where ``SCORE_BENCH_SPANS`` names a folder, it puts
stopwatches between the stages of a request and appends each span to a file of its process. Spans are
on ``time.monotonic``, which all processes of one machine share (CLOCK_MONOTONIC). On a GPU each span begins and ends
with a synchronisation, so this is for one request at a time.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPANS_VARIABLE = "SCORE_BENCH_SPANS"

_installed = False


def install() -> None:
    """Entry point of ``vllm.general_plugins``; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    from score_vllm.models import video_loaders  # noqa: F401

    if folder := os.environ.get(SPANS_VARIABLE):
        _watch_stages(Path(folder) / f"spans-{os.getpid()}.jsonl")


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _watch_stages(path: Path) -> None:
    from vllm.connections import HTTPConnection
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from vllm.multimodal.media.video import VideoMediaIO
    from vllm.multimodal.processing import BaseMultiModalProcessor

    from score_vllm.models.adapter import VideoCompressor
    from score_vllm.models.downloads import Downloads

    def write(name: str, start: float) -> None:
        # Opened anew: forked processes must not share a position. A line is one write.
        line = json.dumps({"name": name, "start": start, "end": time.monotonic()}) + "\n"
        with open(path, "a") as file:
            file.write(line)

    def watch(owner: type, method: str, name: str, on_device: bool = False) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if on_device:
                _synchronize()
            start = time.monotonic()
            out = inner(*args, **kwargs)
            if on_device:
                _synchronize()
            write(name, start)
            return out

        setattr(owner, method, timed)

    def watch_download(owner: type) -> None:
        fetch = owner.async_get_bytes

        @functools.wraps(fetch)
        async def timed_fetch(*args: Any, **kwargs: Any) -> bytes:
            start = time.monotonic()
            data = await fetch(*args, **kwargs)
            write("download", start)
            return data

        owner.async_get_bytes = timed_fetch

    # vLLM's own, and score-serve's, which does not call it.
    watch_download(HTTPConnection)
    watch_download(Downloads)
    watch(VideoMediaIO, "load_bytes", "decode")
    watch(BaseMultiModalProcessor, "apply", "preprocess")
    # The tower with everything after it, selection included; the split takes selection out again.
    watch(Qwen2_5_VLForConditionalGeneration, "embed_multimodal", "encode", on_device=True)
    watch(VideoCompressor, "compress", "compress", on_device=True)
    # Called by the runner outside of compiled code.
    watch(Qwen2_5_VLForConditionalGeneration, "forward", "llm", on_device=True)
