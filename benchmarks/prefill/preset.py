"""What the prefill benchmark runs: model shapes and prompts from presets/*.json, and model folders made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from benchmarks.prefill.flops import TextShape
from score_vllm.budget import num_retained_tokens
from score_vllm.layout import LEARNED, VideoLayout, grid_layout, interleaved_layout, sequential_layout
from score_vllm.types import VideoGrid

PRESETS = Path(__file__).resolve().parent / "presets"
ENGINES = ("vllm", "transformers")
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision")
# The vLLM engine's prompts are of this family alone.
SERVED_FAMILIES = ("qwen2_5_vl",)
# Qwen3-VL and Qwen3.5 write "<12.5 seconds>" before every temporal cell, about seven tokens, and two markers around it.
TIMESTAMP_TOKENS = 7
SECONDS_PER_CELL = 1.0
SEED = 20260323
PAPER_RATIOS = (0.4, 0.25, 0.1)


Grid = Annotated[VideoGrid, BeforeValidator(lambda grid: grid if isinstance(grid, VideoGrid) else VideoGrid(*grid))]


class Preset(BaseModel):
    """A model and a prompt.

    Attributes:
        name: of the preset; part of the results file's name.
        description: in words, for tables.
        weights: ``demo`` (the embedded demo model), ``recipe`` (the demo's recipe with other sizes: overrides in
            ``config``), ``random`` (a whole Hugging Face ``config``; weights are drawn on the device), or
            ``checkpoint`` (``config`` and weights of the directory or hub id in ``model``).
        dtype: a torch dtype name.
        needs_gpu: True where a CPU would take hours.
        videos: token grids. 42,566 tokens, the paper's mean over a benchmark, are twice a prime, so that no one grid
            has them; 64 x 19 x 35 and a second clip of 6 tokens do.
        text_tokens: all tokens that are neither visual nor a span's own (timestamps, markers of cells, newlines).
        engines: in the order in which they run.
        repeats: timed runs per row.
        config, model: see ``weights``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    weights: Literal["demo", "recipe", "random", "checkpoint"]
    dtype: Literal["float32", "bfloat16", "float16"]
    needs_gpu: bool
    videos: tuple[Grid, ...] = Field(min_length=1)
    text_tokens: int = Field(ge=8)
    engines: tuple[Literal["vllm", "transformers"], ...] = Field(min_length=1)
    repeats: int = Field(ge=1)
    config: dict[str, Any] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _config_goes_with_weights(self) -> Preset:
        if (self.config is None) != (self.weights in ("demo", "checkpoint")):
            raise ValueError("config goes with weights 'recipe' and 'random', and only with them")
        return self

    @property
    def visual_tokens(self) -> int:
        """Of all videos, before compression."""
        return sum(grid.num_tokens for grid in self.videos)

    def retained_tokens(self, ratio: float | None) -> int:
        """K summed over the videos; all of them for None (vanilla)."""
        if ratio is None:
            return self.visual_tokens
        return sum(self.retained_of(grid, ratio) for grid in self.videos)

    def retained_of(self, grid: VideoGrid, ratio: float) -> int:
        """K of one video."""
        return num_retained_tokens(grid.num_tokens, ratio)

    def layouts(self, config: Mapping[str, Any]) -> list[VideoLayout]:
        """The span of each video, in the format of the model with this config."""
        return [span_of(config, grid) for grid in self.videos]

    def structure_tokens(self, config: Mapping[str, Any]) -> int:
        """What stands in the spans beside visual tokens."""
        return sum(layout.structure_tokens for layout in self.layouts(config))


def span_of(config: Mapping[str, Any], grid: VideoGrid) -> VideoLayout:
    """The span of a video; timestamps are any text of the usual length."""
    family = config["model_type"]
    if family in ("qwen3_vl", "qwen3_5"):
        prefix = [*range(TIMESTAMP_TOKENS), config["vision_start_token_id"]]
        return interleaved_layout(grid, [prefix] * grid.t, [[config["vision_end_token_id"]]] * grid.t)
    if family == "llava_onevision":
        newline = config.get("mm_newline_position", "one_token")
        suffixes = [[]] * (grid.t - 1) + [[LEARNED] if newline == "one_token" else []]
        return sequential_layout(grid, [[]] * grid.t, suffixes, row_newlines=newline == "grid")
    return grid_layout(grid, SECONDS_PER_CELL * config["vision_config"].get("tokens_per_second", 1))


def load_preset(name: str, **changes: Any) -> Preset:
    """Read a preset by name (a file of presets/) or by path (ends in .json).

    Args:
        name: name or path.
        changes: fields to replace; None leaves a field as it is.

    Raises:
        ValueError: no such preset, unknown or missing fields, or a value out of range.
    """
    path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in PRESETS.glob("*.json"))
        raise ValueError(f"preset must be one of {known} or a .json file, got {name!r}")
    raw = json.loads(path.read_text(encoding="utf-8"))
    return read_preset(path.name, name=path.stem, **raw | {key: v for key, v in changes.items() if v is not None})


def read_preset(where: str, **fields: Any) -> Preset:
    """A checked preset; a ValueError says in one line what is wrong."""
    try:
        return Preset(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {place}: {first['msg']}, got {first['input']!r:.100}") from None


def checkpoint_preset(model: str, like: Preset) -> Preset:
    """A real model's weights with the prompt of another preset."""
    name = Path(model.rstrip("/")).name or "model"
    changes = {"name": name, "description": f"the weights of {model}", "weights": "checkpoint", "config": None}
    return read_preset(model, **dict(like) | changes | {"model": model})


@dataclass(frozen=True)
class Prepared:
    """A preset whose model can be loaded.

    Attributes:
        preset: the preset.
        path: directory (or hub id) with config, tokenizer and processor, and weights where ``has_weights``.
        has_weights: False where the engine has to draw them.
        config: the model's Hugging Face config.
        policy: directory of a retention policy that fits, or None: seeded weights.
    """

    preset: Preset
    path: str
    has_weights: bool
    config: dict[str, Any]
    policy: str | None

    @property
    def family(self) -> str:
        """Hugging Face model type."""
        return str(self.config["model_type"])

    @property
    def shape(self) -> TextShape:
        """For counting FLOPs."""
        return TextShape.from_config(self.config)

    def total_tokens(self, ratio: float | None) -> int:
        """Length of the prompt."""
        preset = self.preset
        return preset.retained_tokens(ratio) + preset.text_tokens + preset.structure_tokens(self.config)


def prepare(preset: Preset, folder: Path, policy: str | None = None) -> Prepared:
    """Build what the preset names.

    Args:
        preset: the preset.
        folder: an empty folder to build in.
        policy: directory of a retention policy; None takes the demo's for the demo, else writes seeded weights.

    Raises:
        ValueError: the model's family is not one of ``FAMILIES``.
    """
    from score_vllm.demo import build_model, ensure_demo

    model = folder / "model"
    path = str(model)
    if preset.weights == "demo":
        demo, demo_policy = ensure_demo()
        path, policy = str(demo), policy or str(demo_policy)
    elif preset.weights == "recipe":
        build_model(model, seed=SEED, dtype=preset.dtype, **(preset.config or {}))
    elif preset.weights == "random":
        _write_shell(preset, model)
    else:
        path = str(preset.model)
    config = _read_config(path)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type must be one of {FAMILIES}, got {config.get('model_type')!r}")
    if policy is None:
        from score_vllm.policy import RetentionPolicy

        policy = str(folder / "policy")
        width = TextShape.from_config(config).hidden_size
        RetentionPolicy(width, seed=SEED).save_pretrained(Path(policy), origin="seeded random weights, not trained")
    return Prepared(preset, path, preset.weights != "random", config, policy)


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(path).to_dict())


def _write_shell(preset: Preset, directory: Path) -> None:
    """A model folder without weights: the preset's config with the demo tokenizer's ids, its tokenizer and processor.

    The demo's tokenizer knows 270 tokens; the vocabulary, and with it the head's width, stays the config's.
    """
    from score_vllm.demo import build_model, build_tokenizer

    assert preset.config is not None
    # A model of the demo's size lends its tokenizer and processor files.
    build_model(directory)
    for weights in directory.glob("*.safetensors*"):
        weights.unlink()
    config = dict(preset.config)
    tokenizer = build_tokenizer()
    key = "token_index" if config["model_type"] == "llava_onevision" else "token_id"
    for kind, token in (("image", "image_pad"), ("video", "video_pad")):
        config[f"{kind}_{key}"] = tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    for kind in ("vision_start", "vision_end"):
        config[f"{kind}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{kind}|>")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
