"""Prefill in vLLM: plain, with SCORE, and with vLLM's own pruning, side by side in this process.

What is timed: ``llm_forward`` is the time inside the language model's layers until the first token, ``compressor`` is
selection alone (with the attention read-out, for methods that rank by it), ``total`` is their sum. The vision tower is
the same in every row and in neither.
"""

from __future__ import annotations

from typing import Any

from benchmarks.clips import draw_frames
from benchmarks.engine import Engine, as_loaded
from benchmarks.prefill.preset import Prepared
from benchmarks.prefill.rows import CheckError, Times
from score_vllm import methods
from score_vllm.config import ServingConfig

HEAD = "<|im_start|>user\n"
SPAN = "<|vision_start|><|video_pad|><|vision_end|>"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
# Tokens compared at ratio 1.
ANSWER = 8
# Generous bounds, so that frames enter the tower at the size at which they are made.
SIZES = {"videos_kwargs": {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}}}


class VllmEngine(Engine):
    """The engine of a preset.

    Args:
        prepared: the preset.
        serving: our serving configuration; None leaves vLLM as it is.
        pruning: ``(method, rate)`` of vLLM's own pruning, or None.
        gpu_memory: share of a GPU's memory that this engine may take; several live side by side.
    """

    def __init__(
        self,
        prepared: Prepared,
        serving: ServingConfig | None = None,
        pruning: tuple[str, float] | None = None,
        gpu_memory: float = 0.3,
    ) -> None:
        self.prepared, preset = prepared, prepared.preset
        options: dict[str, Any] = {} if prepared.has_weights else {"load_format": "dummy"}
        if pruning is not None:
            options.update(video_pruning_method=pruning[0], video_pruning_rate=pruning[1])
        super().__init__(
            prepared.path,
            serving,
            dtype=preset.dtype,
            # Room for the answer of the check, in whole blocks.
            length=-(-(prepared.total_tokens(None) + 256) // 128) * 128,
            videos=len(preset.videos),
            mm_processor_kwargs=SIZES,
            gpu_memory_utilization=gpu_memory,
            **options,
        )
        if not prepared.has_weights:
            draw_weights(self.module)
        if pruning is not None:
            self.watch(self.module, "_postprocess_video_embeds_evs", "compressor")
        # Text with exactly the preset's number of tokens where the tokenizer allows (one byte, one token).
        start = HEAD + SPAN * len(preset.videos)
        taken = len(self.llm.get_tokenizer().encode(start + TAIL)) - len(preset.videos)
        text = "What happens?" if preset.weights == "checkpoint" else "?" * max(0, preset.text_tokens - taken)
        self.prompt = start + text + TAIL

    def ask(self, seed: int, ratio: float | None = None, method: str | None = None, num_tokens: int = 1) -> Any:
        """One request about videos of the preset's grids; no seed's videos are another's."""
        vision = self.prepared.config["vision_config"]
        patch = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
        videos = []
        for number, grid in enumerate(self.prepared.preset.videos):
            frames = draw_frames(max(2, 2 * grid.t), grid.h * patch, grid.w * patch, seed * 16 + number)
            videos.append(as_loaded(frames))
        return self.run(self.prompt, videos, ratio, method, num_tokens)

    def timed(self, seed: int, ratio: float | None = None, method: str | None = None) -> Times:
        """Milliseconds of one prefill."""
        self.ask(seed, ratio, method)
        compressor, forward = self.ms["compressor"], self.ms["forward"]
        if method is not None and methods.get(method).saliency:
            compressor += self.ms["saliency"]
        return {"compressor": compressor, "llm_forward": forward, "total": compressor + forward}

    def counts(self, output: Any) -> tuple[int, int]:
        """``(visual, all)`` tokens of a prompt; checks that the language model ran once, over all of them.

        Raises:
            CheckError: it did not.
        """
        length = len(output.prompt_token_ids)
        if self.forward_rows[0] != length:
            raise CheckError(f"the language model ran over {self.forward_rows[0]} rows, the prompt has {length}")
        return self.visual_tokens(output), length


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

    Returns:
        ``(visual, all)`` tokens of the uncompressed prompt.

    Raises:
        CheckError: says what differs.
    """
    preset = vanilla.prepared.preset
    plain = vanilla.ask(seed, num_tokens=ANSWER)
    visual, total = vanilla.counts(plain)
    if visual != preset.visual_tokens:
        raise CheckError(f"the processor made {visual} visual tokens, the preset has {preset.visual_tokens}")
    for name in names:
        whole = score.ask(seed, 1.0, name, num_tokens=ANSWER)
        if score.counts(whole) != (visual, total):
            raise CheckError(f"{name} at ratio 1 does not keep the {visual} visual tokens")
        if list(plain.outputs[0].token_ids) != list(whole.outputs[0].token_ids):
            raise CheckError(f"{name} at ratio 1 and plain vLLM give different tokens")
        for ratio in ratios:
            kept, length = score.counts(score.ask(seed, ratio, name))
            want = [preset.retained_of(grid, ratio) for grid in preset.videos]
            if kept != sum(want) or length != kept + total - visual or score.compressed_rows != want:
                raise CheckError(f"{name} at {ratio} kept {score.compressed_rows}, {kept} in the prompt; not {want}")
    return visual, total
