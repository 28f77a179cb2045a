"""A vLLM engine in this process, plain or with SCORE, with stopwatches round its language model and selection."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from typing import Any

# Before vllm is imported: one process, so that the model can be reached, and our plug-in alone. Without a serving
# configuration our model class does what vLLM's does.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_PLUGINS", "score")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np

from benchmarks.harness import Stopwatch
from score_vllm.config import ServingConfig

# A video as a loader gives it: frames [F, H, W, 3] uint8, and metadata.
Video = tuple[np.ndarray, dict[str, Any]]


def as_loaded(frames: np.ndarray) -> Video:
    """Frames with the metadata of a loader that read all of them, at two per second."""
    count = len(frames)
    metadata = {
        "total_num_frames": count,
        "fps": 2.0,
        "duration": count / 2.0,
        "video_backend": "benchmark",
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
    }
    return frames, metadata


class Engine:
    """One engine for one request at a time, without caches.

    Args:
        model: directory or hub id.
        serving: our serving configuration; None leaves vLLM as it is.
        dtype: of the model.
        length: context in tokens, which is also the most tokens of a step.
        videos: most videos of a prompt.
        options: further arguments of vLLM's ``LLM``.

    Attributes:
        ms: milliseconds inside ``forward`` (the language model), ``compressor`` and ``saliency`` in the last request.
        forward_rows: length of each forward pass of the last request.
        compressed_rows: rows that each call of the compressor gave.
    """

    def __init__(
        self, model: str, serving: ServingConfig | None, *, dtype: str, length: int, videos: int = 1, **options: Any
    ) -> None:
        from vllm import LLM

        if serving is not None:
            # Rows share videos: a later one would find the vision tower's work, and its attention, done.
            options["hf_overrides"] = replace(serving, cell_cache_gib=0).to_overrides()
        self.llm = LLM(
            model=model,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=length,
            # vLLM's encoder cache has this many rows, and a video must fit into it.
            max_num_batched_tokens=max(length, 2048),
            max_num_seqs=1,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"video": videos, "image": 0},
            seed=0,
            **options,
        )
        self.module = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        if serving is not None and getattr(self.module, "compressor", None) is None:
            raise RuntimeError("vLLM did not load our plug-in; install this package in the environment of vLLM")
        self.pad = self.llm.get_tokenizer().convert_tokens_to_ids("<|video_pad|>")
        self.ms = {"forward": 0.0, "compressor": 0.0, "saliency": 0.0}
        self.forward_rows: list[int] = []
        self.compressed_rows: list[int] = []
        self.watch(self.module.language_model.model, "forward", "forward")
        if serving is not None:
            self.watch(self.module.compressor, "compress", "compressor")
            if self.module._saliency is not None:
                self.watch(self.module._saliency, "take", "saliency")

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Add the time inside a method to ``ms[label]``."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with Stopwatch() as watch:
                out = inner(*args, **kwargs)
            self.ms[label] += watch.ms
            if label == "forward":
                positions = kwargs["positions"] if "positions" in kwargs else args[1]
                self.forward_rows.append(int(positions.shape[-1]))
            elif label == "compressor" and hasattr(out, "shape"):
                self.compressed_rows.append(int(out.shape[0]))
            return out

        setattr(owner, name, timed)

    def run(
        self,
        prompt: str,
        videos: list[Video],
        ratio: float | None = None,
        method: str | None = None,
        num_tokens: int = 1,
    ) -> Any:
        """One request, from decoded frames to its last token; returns vLLM's output."""
        from vllm import SamplingParams

        request: dict[str, Any] = {"prompt": prompt, "multi_modal_data": {"video": videos}}
        asked = {"retention_ratio": ratio, "retention_method": method}
        if ratio is not None:
            request["mm_processor_kwargs"] = {name: value for name, value in asked.items() if value is not None}
        self.ms = dict.fromkeys(self.ms, 0.0)
        self.forward_rows.clear()
        self.compressed_rows.clear()
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        (output,) = self.llm.generate([request], params, use_tqdm=False)
        return output

    def visual_tokens(self, output: Any) -> int:
        """Video tokens in the prompt of an output."""
        return list(output.prompt_token_ids).count(self.pad)

    def close(self) -> None:
        """Give the memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.module
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
