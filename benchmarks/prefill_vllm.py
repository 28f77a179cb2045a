"""vLLM engines with stop-watches: plain vLLM, SCORE, and vLLM's own pruning, all in this process.

What is timed: ``llm_forward`` is the time inside the language model's layers until the first token, ``compressor`` is
selection alone (with the attention read-out, for methods that rank by it), ``total`` is their sum. The vision tower is
the same in every row and in neither.
"""

from __future__ import annotations

import gc
import os
from typing import Any

# Before vllm is imported: one process, so that the model can be reached, and our plug-in alone.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_PLUGINS", "score")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
from harness import Stopwatch
from prefill_presets import Prepared
from prefill_transformers import CheckError

from score_vllm import methods
from score_vllm.types import VideoGrid

HEAD = "<|im_start|>user\n"
SPAN = "<|vision_start|><|video_pad|><|vision_end|>"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
# Tokens compared at ratio 1.
ANSWER = 8
# Generous bounds, so that frames enter the tower at the size at which they are made.
SIZES = {"videos_kwargs": {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}}}


def make_video(grid: VideoGrid, patch: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A textured ground and a moving square, of the size that gives the grid. Each seed is another video, so that no
    cache can answer.

    Args:
        grid: token grid; two frames per cell.
        patch: pixels per token and axis (28 for Qwen2.5-VL).
        seed: of the texture.
    """
    rng = np.random.default_rng(seed)
    frames, height, width = 2 * grid.t, grid.h * patch, grid.w * patch
    ground = rng.integers(0, 160, (height, width, 3), dtype=np.uint8)
    pictures = np.repeat(ground[None], frames, axis=0)
    side = max(1, min(height, width) // 4)
    for i in range(frames):
        left = (width - side) * i // max(1, frames - 1)
        pictures[i, side : 2 * side, left : left + side] = rng.integers(160, 256, 3)
    metadata = {
        "total_num_frames": frames,
        "fps": 2.0,
        "duration": frames / 2.0,
        "video_backend": "benchmark",
        "frames_indices": list(range(frames)),
        "do_sample_frames": False,
    }
    return pictures, metadata


class VllmEngine:
    """One engine.

    Args:
        prepared: the preset.
        serving: our serving configuration; None leaves vLLM as it is.
        pruning: ``(method, rate)`` of vLLM's own pruning, or None.
        gpu_memory: share of a GPU's memory that this engine may take; several live side by side.
    """

    def __init__(
        self,
        prepared: Prepared,
        serving: Any = None,
        pruning: tuple[str, float] | None = None,
        gpu_memory: float = 0.3,
    ) -> None:
        from vllm import LLM

        self.prepared = prepared
        vision = prepared.config["vision_config"]
        self.patch = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
        # Room for the answer of the check, in whole blocks.
        length = -(-(prepared.total_tokens(None) + 256) // 128) * 128
        options: dict[str, Any] = {}
        if pruning is not None:
            options.update(video_pruning_method=pruning[0], video_pruning_rate=pruning[1])
        if not prepared.has_weights:
            options["load_format"] = "dummy"
        self.llm = LLM(
            model=prepared.path,
            hf_overrides=serving.to_overrides() if serving else {},
            dtype=prepared.preset.dtype,
            enforce_eager=True,
            max_model_len=length,
            max_num_batched_tokens=length,
            max_num_seqs=1,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            mm_processor_kwargs=SIZES,
            limit_mm_per_prompt={"video": len(prepared.preset.videos), "image": 0},
            gpu_memory_utilization=gpu_memory,
            seed=0,
            **options,
        )
        self.module = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        if serving is not None and getattr(self.module, "compressor", None) is None:
            raise CheckError("vLLM did not load our plug-in; install this package in the environment of vLLM")
        if not prepared.has_weights:
            draw_weights(self.module)
        self.ms = {"forward": 0.0, "compressor": 0.0, "saliency": 0.0}
        self.forward_rows: list[int] = []
        self.compressed_rows: list[int] = []
        self._watch(self.module.language_model.model, "forward", "forward")
        if serving is not None:
            self._watch(self.module.compressor, "compress", "compressor")
            if self.module._saliency is not None:
                self._watch(self.module._saliency, "take", "saliency")
        elif pruning is not None:
            self._watch(self.module, "_postprocess_video_embeds_evs", "compressor")
        self.pad = self.llm.get_tokenizer().convert_tokens_to_ids("<|video_pad|>")
        self.prompt = self._prompt()

    def _prompt(self) -> str:
        """Text with exactly the preset's number of tokens where the tokenizer allows (one byte, one token)."""
        videos = len(self.prepared.preset.videos)

        def wrap(middle: str) -> str:
            return HEAD + SPAN * videos + middle + TAIL

        tokenizer = self.llm.get_tokenizer()
        missing = self.prepared.preset.text_tokens + videos - len(tokenizer.encode(wrap("")))
        return wrap("?" * max(0, missing)) if self.prepared.preset.weights != "checkpoint" else wrap("What happens?")

    def _watch(self, owner: Any, name: str, label: str) -> None:
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

    def run(self, seed: int, ratio: float | None = None, method: str | None = None, num_tokens: int = 1) -> Any:
        """One request; ``self.ms`` and the row counts are of this request afterwards.

        Returns:
            vLLM's output.
        """
        from vllm import SamplingParams

        grids = self.prepared.preset.videos
        videos = [make_video(grid, self.patch, seed=seed * 16 + n) for n, grid in enumerate(grids)]
        request: dict[str, Any] = {"prompt": self.prompt, "multi_modal_data": {"video": videos}}
        if ratio is not None and method is not None:
            request["mm_processor_kwargs"] = {"retention_ratio": ratio, "retention_method": method}
        self.ms = dict.fromkeys(self.ms, 0.0)
        self.forward_rows.clear()
        self.compressed_rows.clear()
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        (output,) = self.llm.generate([request], params, use_tqdm=False)
        return output

    def timed(self, seed: int, ratio: float | None = None, method: str | None = None) -> dict[str, float]:
        """Milliseconds of one prefill."""
        self.run(seed, ratio, method)
        compressor = self.ms["compressor"]
        if method is not None and methods.get(method).needs_saliency:
            compressor += self.ms["saliency"]
        forward = self.ms["forward"]
        return {"compressor": compressor, "llm_forward": forward, "total": compressor + forward}

    def counts(self, output: Any) -> tuple[int, int]:
        """``(visual, all)`` tokens of a prompt; checks that the language model ran once, over all of them.

        Raises:
            CheckError: it did not.
        """
        ids = list(output.prompt_token_ids)
        if self.forward_rows[0] != len(ids):
            raise CheckError(f"the language model ran over {self.forward_rows[0]} rows, the prompt has {len(ids)}")
        return ids.count(self.pad), len(ids)

    def close(self) -> None:
        """Give the memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.module
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def draw_weights(module: Any, seed: int = 0) -> None:
    """Seeded weights, the same in every engine, with a spread at which answers depend on their prompt.

    vLLM's own dummy weights are within 1e-3 of zero, so that two engines agree whatever they do.
    """
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            generator = torch.Generator(parameter.device).manual_seed(seed)
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
            seed += 1


def check_compressed(
    vanilla: VllmEngine, score: VllmEngine, ratios: list[float], names: list[str], seed: int
) -> tuple[int, int]:
    """Answers before times: every method equals plain vLLM at ratio 1; every ratio keeps exactly K tokens per video.

    Args:
        vanilla: plain vLLM.
        score: ours.
        ratios: to be timed.
        names: methods.
        seed: of a video that is not timed.

    Returns:
        ``(visual, all)`` tokens of the uncompressed prompt.

    Raises:
        CheckError: says what differs.
    """
    preset = vanilla.prepared.preset
    plain = vanilla.run(seed, num_tokens=ANSWER)
    visual, total = vanilla.counts(plain)
    if visual != preset.visual_tokens:
        raise CheckError(f"the processor made {visual} visual tokens, the preset has {preset.visual_tokens}")
    text = total - visual
    for name in names:
        whole = score.run(seed, 1.0, name, num_tokens=ANSWER)
        if score.counts(whole) != (visual, total):
            raise CheckError(f"{name} at ratio 1 does not keep the {visual} visual tokens")
        if list(plain.outputs[0].token_ids) != list(whole.outputs[0].token_ids):
            raise CheckError(f"{name} at ratio 1 and plain vLLM give different tokens")
        for ratio in ratios:
            kept, length = score.counts(score.run(seed, ratio, name))
            want = [preset.retained_of(grid, ratio) for grid in preset.videos]
            if kept != sum(want) or length != kept + text or score.compressed_rows != want:
                raise CheckError(f"{name} at {ratio} kept {score.compressed_rows}, {kept} in the prompt; not {want}")
    return visual, total
