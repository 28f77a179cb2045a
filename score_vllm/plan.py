"""How many videos, and how long ones, a GPU holds: arithmetic on a model's configuration (docs/capacity.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from score_vllm.architectures import BY_NAME, SHORT_NAMES, Architecture
from score_vllm.budget import num_retained_tokens
from score_vllm.catalog import UsageError, resolve_model
from score_vllm.layout import DIGITS, VideoLayout, grid_layout, timestamped_layout
from score_vllm.positions import POSITION_CHANNELS
from score_vllm.types import VideoGrid
from score_vllm.vision.pooling import frames_layout

GIB = 1 << 30
# vLLM's defaults.
UTILIZATION = 0.92
BLOCK_SIZE = 16
# CUDA context, graphs and the language model's own activations; a guess.
RESERVE_GIB = 2.0
LLAVA = "LlavaOnevisionForConditionalGeneration"
TIMESTAMPED = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")
GATED = "Qwen2_5_VLForConditionalGeneration"
PLANNED = (GATED, "Qwen2VLForConditionalGeneration", *TIMESTAMPED, LLAVA)


def read_config(model: str) -> dict[str, Any]:
    """``config.json`` of a directory, of a short name whose numbers are built in, or of a hub id.

    Raises:
        UsageError: there is none.
    """
    built_in = json.loads(files("score_vllm").joinpath("assets/model_configs.json").read_text())
    names = {hub: short for short, hub in SHORT_NAMES.items()}
    if (short := names.get(model, model)) in built_in["models"]:
        return built_in["models"][short]
    source = resolve_model(model).path
    path = Path(source).expanduser() / "config.json"
    try:
        if not path.parent.is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, "config.json"))
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--model {model!r}: no config.json ({reason}); give a directory that has one, a hub id, or one of "
            f"{', '.join(built_in['models'])}, whose numbers are built in"
        ) from error


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic reads of a model.

    Attributes:
        entry: of the table of supported models.
        config: transformers' configuration.
        parameters: of the whole model.
        encode: token ids of a text; None counts them as Qwen's tokenizer does.
    """

    entry: Architecture
    config: Any
    parameters: int
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def from_model(cls, model: str) -> ModelShape:
        """Of a name that :func:`read_config` knows; parameters are counted on a model without storage.

        Raises:
            UsageError: no configuration, or a model that cannot be planned.
        """
        raw = dict(read_config(model))
        name = (raw.get("architectures") or ["none"])[0]
        if name not in BY_NAME:
            raise UsageError(f"--model {model!r} is a {name}; supported architectures: {', '.join(BY_NAME)}")
        if name not in PLANNED:
            raise UsageError(
                f"--model {model!r} is a {name}, for which no plan is made (only for {', '.join(PLANNED)}); the "
                "server's log says its KV cache size and concurrency"
            )
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            built = AutoModelForImageTextToText.from_config(config)
        encode = None
        if (path := Path(model).expanduser() / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        return cls(BY_NAME[name], config, sum(p.numel() for p in built.parameters()), encode)

    @cached_property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def context(self) -> int:
        """Positions that the model was trained for: vLLM's default for ``--max-model-len``."""
        return int(self.config.get_text_config().max_position_embeddings)

    @cached_property
    def frames_per_cell(self) -> int:
        """Frames that share visual tokens."""
        return 1 if self.entry.name == LLAVA else int(self.config.vision_config.temporal_patch_size)

    @property
    def has_text(self) -> bool:
        """Whether text stands inside a video's span."""
        return self.entry.name in TIMESTAMPED

    def kv_values(self, gpus: int = 1) -> int:
        """Numbers per token in the KV cache of one GPU."""
        text = self.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * max(1, text.num_key_value_heads // gpus) * head_dim

    def layout(self, frames: int, tokens: int, fps: float) -> VideoLayout:
        """Span of a video.

        Args:
            frames: that are read.
            tokens: N; of no account where all frames have one size.
            fps: at which they are read.
        """
        if self.entry.name == LLAVA:
            return frames_layout(self.config, frames)
        cells = -(-frames // self.frames_per_cell)
        rows = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        grid = VideoGrid(cells, rows, tokens // rows)
        seconds = self.frames_per_cell / fps
        if self.has_text:
            # "<", the digits one by one, ".", a digit, " seconds", ">"
            encode = self.encode or (lambda text: [0] * (4 + len(text.split(".")[0])))
            stamps = [(cell + 0.5) * seconds for cell in range(cells)]
            return timestamped_layout(grid, stamps, encode, 0, 0)
        clock = getattr(self.config.vision_config, "tokens_per_second", None)
        return grid_layout(grid, 1.0 if clock is None else clock * seconds)

    def tower_values(self, grid: VideoGrid) -> int:
        """Numbers that the vision tower holds at its widest place, with the pixels of the video."""
        vision = self.config.vision_config
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio
        if self.entry.name == LLAVA:
            patches = grid.t * (vision.image_size // vision.patch_size) ** 2
            pixels = grid.t * 3 * vision.image_size**2
        else:
            patches = grid.num_tokens * vision.spatial_merge_size**2
            pixels = patches * 3 * vision.patch_size**2 * vision.temporal_patch_size
        gated = 3 if self.entry.name == GATED else 2
        return int(pixels + patches * (2 * width + gated * inner))

    @cached_property
    def row_values(self) -> int:
        """Numbers per row of the encoder cache: deepstack levels and position channels included."""
        levels = len(getattr(self.config.vision_config, "deepstack_visual_indexes", ()))
        return self.hidden_size * (1 + levels) + POSITION_CHANNELS + (DIGITS if self.has_text else 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One server.

    Attributes:
        shape: of the model.
        frames: ``--max-frames``.
        tokens: N, visual tokens of a cell of the largest frame admitted.
        fps: frames per second read.
        memory: bytes of one GPU that vLLM may use.
        cell_cache: bytes of ``--cell-cache-gib``.
        gpus: ``--tensor-parallel-size``.
        text_tokens: of a request beside its video: question and answer.
        max_model_len: None for the model's own.
        weight_bytes: of a parameter.
        value_bytes: of an activation and of a number in the KV cache.
        block_size: tokens in a block of the KV cache.
        reserve: bytes, see :data:`RESERVE_GIB`.
    """

    shape: ModelShape
    frames: int
    tokens: int
    memory: float
    cell_cache: float
    fps: float = 2.0
    gpus: int = 1
    text_tokens: int = 512
    max_model_len: int | None = None
    weight_bytes: float = 2
    value_bytes: int = 2
    block_size: int = BLOCK_SIZE
    reserve: float = RESERVE_GIB * GIB

    @cached_property
    def layout(self) -> VideoLayout:
        """Of the video."""
        return self.shape.layout(self.frames, self.tokens, self.fps)

    @property
    def kv_bytes(self) -> int:
        """Of a token in the KV cache of one GPU."""
        return self.shape.kv_values(self.gpus) * self.value_bytes

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of one GPU beside the KV cache."""
        rows = self.layout.grid.num_tokens + self.layout.structure_tokens
        return {
            "weights": self.shape.parameters * self.weight_bytes / self.gpus,
            "vision tower": self.shape.tower_values(self.layout.grid) * self.value_bytes,
            "encoder cache": rows * self.shape.row_values * self.value_bytes,
            "cell cache": self.cell_cache,
            "reserve": self.reserve,
        }

    @property
    def blocks(self) -> int:
        """Of the KV cache; 0 where nothing is left for it."""
        return max(0, int((self.memory - sum(self.parts.values())) // (self.kv_bytes * self.block_size)))

    @property
    def kv_tokens(self) -> int:
        """That the KV cache holds."""
        return self.blocks * self.block_size

    def prompt_tokens(self, ratio: float) -> int:
        """Slots of a request with one such video: kept tokens, structure and text."""
        kept = num_retained_tokens(self.layout.grid.num_tokens, ratio)
        return kept + self.layout.structure_tokens + self.text_tokens

    def concurrent(self, ratio: float) -> int:
        """Such requests that the KV cache holds at once; whole blocks each."""
        return self.blocks // -(-self.prompt_tokens(ratio) // self.block_size) if self.fits(ratio) else 0

    def fits(self, ratio: float) -> bool:
        """Whether one such request can be served at all."""
        return self.limit(ratio) is None

    def limit(self, ratio: float) -> str | None:
        """What a request would exceed; None: nothing."""
        window = self.max_model_len or self.shape.context
        needed = self.prompt_tokens(ratio)
        if needed > window:
            return "the context window"
        if needed > self.kv_tokens:
            return "memory"
        table = self.shape.context * (1 if self.shape.has_text else 4)
        return "the table of positions" if self.layout.extent + self.text_tokens > table else None

    def longest(self, ratio: float) -> tuple[int, str]:
        """Frames of the longest video that a server made for it would serve, and what a longer one would exceed."""
        step = self.shape.frames_per_cell
        low, high = 0, 1
        while replace(self, frames=high * step).fits(ratio):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if replace(self, frames=middle * step).fits(ratio) else (low, middle)
        return low * step, str(replace(self, frames=high * step).limit(ratio))
