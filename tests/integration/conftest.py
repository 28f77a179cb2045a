"""One vLLM engine on the CPU, in this process, shared by the tier."""

from __future__ import annotations

import contextlib
import os

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_PLUGINS="score",
    VLLM_LOGGING_LEVEL="WARNING",
)

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from score_vllm.config import ServingConfig
from score_vllm.plugin import ENCODER_CACHE_MANAGER
from tests.conftest import SERVED

from .family_oracle import random_video

# Every request is cut into chunks of this many tokens, so boundaries fall inside videos all the time.
CHUNK = 16


@dataclass
class Engine:
    """The engine and what passed through its compressor."""

    llm: Any
    compressed: list[tuple[torch.Tensor, Any, int]] = field(default_factory=list)
    saliency: list[torch.Tensor | None] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.compressed.clear()
        self.saliency.clear()
        self.images.clear()
        self.positions.clear()
        self.keys.clear()


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tiny_policy: Path, tiny_selector: Path) -> Iterator[Engine]:
    """A compressed engine in fp32 with tiny prefill chunks and prefix caching."""
    pytest.importorskip("vllm")
    from vllm import LLM
    from vllm.config import EncoderCacheManagerConfig

    from score_vllm.models.worker import WORKER_EXTENSION

    serving = ServingConfig(
        0.1,
        "score",
        allowed_methods=tuple(name for name in SERVED if name != "score"),
        policy=str(tiny_policy),
        selectors={"visionselector": str(tiny_selector)},
    )
    llm = LLM(
        model=str(tiny_model),
        hf_overrides=serving.to_overrides(),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        enable_prefix_caching=True,
        block_size=32,
        max_logprobs=-1,
        enable_mm_embeds=True,
        # As score-serve starts its engine.
        ec_manager_config=EncoderCacheManagerConfig(encoder_cache_manager_cls=ENCODER_CACHE_MANAGER),
        worker_extension_cls=WORKER_EXTENSION,
        seed=0,
    )
    made = Engine(llm)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    compress, process_image = model.compressor.compress, model._process_image_input
    inner_forward = model.language_model.model.forward

    def spy_compress(
        x: torch.Tensor,
        layout: Any,
        num_retained: int,
        method: str,
        saliency: torch.Tensor | None,
        learned: Any,
        key: str,
    ) -> torch.Tensor:
        made.compressed.append((x.clone(), layout, num_retained))
        made.saliency.append(None if saliency is None else saliency.clone())
        made.keys.append(key)
        return compress(x, layout, num_retained, method, saliency, learned, key)

    def spy_image(image_input: Any) -> Any:
        out = process_image(image_input)
        made.images.extend(rows.clone() for rows in out)
        return out

    def spy_forward(*args: Any, **kwargs: Any) -> Any:
        made.positions.append(kwargs["positions"].clone())
        return inner_forward(*args, **kwargs)

    model.compressor.compress = spy_compress
    model._process_image_input = spy_image
    model.language_model.model.forward = spy_forward
    yield made
    # At exit, vLLM's own finalizer comes too late and prints a traceback.
    llm.llm_engine.engine_core._finalizer.detach()
    with contextlib.suppress(ValueError):  # engines of other files may have taken the process groups with them
        llm.llm_engine.engine_core.shutdown()


def make_video(
    num_frames: int, height: int, width: int, seed: int, seconds_per_cell: float = 1.0
) -> tuple[np.ndarray, dict[str, Any]]:
    """Random frames with metadata that gives exactly this many seconds per temporal cell."""
    return random_video(num_frames, height, width, seed, 2.0 / seconds_per_cell)
