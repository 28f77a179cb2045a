"""What is profiled, admitted and charged is one number: T * N of the largest video that the flags allow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.encoder_budget import MultiModalBudget

from score_vllm import num_retained_tokens, plugin
from score_vllm.config import ServingConfig
from score_vllm.models.admission import VideoLimit
from score_vllm.models.processing import CELLS_KEY, NUM_RETAINED_KEY, REPORT_KEY, RequestFieldError
from score_vllm.types import VideoGrid
from score_vllm.vision.cell_cache import count_distinct
from tests.integration.capacity import check_capacity
from tests.integration.conftest import Engine, make_video

PROMPT = "<|vision_start|><|video_pad|><|vision_end|>"


def processor(model: Path, max_frames: int = 8, max_pixels: int | None = None, **options: Any) -> Any:
    """The processor of a server with these flags; no weights are loaded."""
    plugin.register()
    serving = ServingConfig(0.1, "uniform", max_frames=max_frames, max_pixels=max_pixels)
    arguments = EngineArgs(model=str(model), hf_overrides=serving.to_overrides(), **{"max_model_len": 4096, **options})
    config: ModelConfig = arguments.create_model_config()
    return MULTIMODAL_REGISTRY.create_processor(config)


def process(made: Any, video: Any, ratio: float = 1.0, **kwargs: Any) -> Any:
    items = made.info.parse_mm_data({"video": [video]})
    return made(PROMPT, mm_items=items, hf_processor_mm_kwargs={"retention_ratio": ratio, **kwargs})


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the pixel limit of Qwen2.5-VL's published checkpoints: 16,384 tokens a frame."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        if not (file := folder / name).exists():
            continue
        config = json.loads(file.read_text())
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "size" in part:
                part["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
        file.write_text(json.dumps(config))
    return folder


def test_the_default_limit_is_768_tokens_a_cell_as_in_training(wide_model: Path) -> None:
    from score_vllm.train.data.config import DEFAULT_MAX_PIXELS

    made = processor(wide_model, max_frames=4)
    assert made.info.video_limit.max_pixels == DEFAULT_MAX_PIXELS
    assert made.info.video_limit.tokens == 2 * 768
    frames = np.zeros((4, 1080, 1920, 3), np.uint8)
    metadata = make_video(4, 28, 28, seed=0)[1]
    (report,) = process(made, (frames, metadata))[REPORT_KEY]
    assert report.grid == VideoGrid(2, 20, 36), "1080p, which is 2,691 tokens a cell by the checkpoint's own limit"
    # Images keep the checkpoint's limit.
    assert made.info.get_mm_max_tokens_per_item(4096, {"image": 1})["image"] == 16384


def test_the_flag_goes_above_and_below_the_checkpoint(tiny_model: Path, wide_model: Path) -> None:
    assert processor(tiny_model).info.video_limit.tokens == 4 * 192, "the demo's own limit is lower"
    assert processor(tiny_model, max_pixels=300 * 784).info.video_limit.tokens == 4 * 300
    assert processor(wide_model, max_pixels=2000 * 784).info.video_limit.tokens == 4 * 2000
    lowered = processor(wide_model, mm_processor_kwargs={"max_pixels": 100 * 784})
    assert lowered.info.video_limit.tokens == 4 * 100, "an operator's option for images and videos"
    assert lowered.info.get_mm_max_tokens_per_item(4096, {"image": 1})["image"] == 100


def test_a_request_can_only_lower_the_limit(tiny_model: Path) -> None:
    made = processor(tiny_model)
    video = make_video(8, 448, 448, seed=1)
    grids = [
        process(made, video, **options)[REPORT_KEY][0].grid
        for options in ({}, {"max_pixels": 20 * 784}, {"videos_kwargs": {"max_pixels": 20 * 784}})
    ]
    assert grids == [VideoGrid(4, 13, 13), VideoGrid(4, 4, 4), VideoGrid(4, 4, 4)]
    with pytest.raises(RequestFieldError, match="1024 visual tokens"):
        process(made, video, max_pixels=300 * 784)


@pytest.mark.parametrize("flags", [(8, None), (7, 50 * 784), (128, None), (2, 97 * 784)])
def test_profiled_admitted_and_charged_are_one_number(tiny_model: Path, flags: tuple[int, int | None]) -> None:
    made = processor(tiny_model, *flags)
    limit = made.info.video_limit
    assert made.info.get_mm_max_tokens_per_item(4096, {"video": 1})["video"] == limit.tokens
    if limit.tokens >= 4096:
        return
    profiled = made.get_dummy_mm_inputs({"video": 1})["mm_kwargs"]["video"][0]
    assert int(profiled["video_grid_thw"].data.prod()) == 4 * limit.tokens
    assert int(profiled["video_grid_thw"].data[0]) == -(-flags[0] // 2)
    assert int(profiled[NUM_RETAINED_KEY].data) == limit.tokens, "nothing is dropped in the profile"
    assert count_distinct(profiled[CELLS_KEY].data) == -(-flags[0] // 2), "every cell is encoded in the profile"


def test_the_engine_reserves_that_number(engine: Engine) -> None:
    config = engine.llm.llm_engine.vllm_config
    budget = MultiModalBudget(config, MULTIMODAL_REGISTRY)
    limit = budget.processor.info.video_limit.tokens
    assert limit == 64 * 192
    assert budget.encoder_cache_size == budget.encoder_compute_budget == limit
    assert budget.mm_max_items_per_batch["video"] == 1
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.encoder_cache_manager.cache_size == limit
    assert engine.llm.llm_engine.input_processor.mm_encoder_cache_size == limit


def test_score_plan_says_what_the_engine_says(engine: Engine, tiny_model: Path) -> None:
    check_capacity(engine.llm, tiny_model)


def test_what_is_too_large_is_refused_with_tokens_limit_and_flags(tiny_model: Path) -> None:
    """The encoder would have run it in memory that nobody reserved."""
    made = processor(tiny_model, 8, 169 * 784)
    for ratio in (0.01, 1.0):
        (report,) = process(made, make_video(8, 364, 364, seed=2), ratio)[REPORT_KEY]
        assert report.retained_tokens == num_retained_tokens(4 * 169, ratio)
        with pytest.raises(RequestFieldError) as caught:
            process(made, make_video(10, 364, 364, seed=3), ratio)
        text = str(caught.value)
        for part in ("845 visual tokens (5 x 13 x 13)", "at most 676", "--max-frames 8", f"--max-pixels {169 * 784}"):
            assert part in text
    # More frames than --max-frames, if they are small.
    process(made, make_video(16, 112, 112, seed=4))


def test_more_kept_tokens_than_a_prompt_may_have_names_a_ratio_that_fits(tiny_model: Path) -> None:
    made = processor(tiny_model, 16, max_model_len=512)
    video = make_video(16, 364, 364, seed=5)
    with pytest.raises(RequestFieldError, match=r"1352 of 1352 visual tokens .*--max-model-len.* below 0.38"):
        process(made, video)
    process(made, video, 0.37)


def test_a_refused_video_is_not_believed_to_be_in_the_engine(tiny_model: Path) -> None:
    """vLLM's processor cache sends an item once; after a refusal it must send it again."""
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    forgotten: list[str] = []
    made = processor(tiny_model, 16, max_model_len=512)
    items = made.info.parse_mm_data({"video": [make_video(16, 364, 364, seed=6)]})
    inputs = ProcessorInputs(
        made.info.get_tokenizer().encode(PROMPT), items, hf_processor_mm_kwargs={"retention_ratio": 1.0}
    )
    cache = MultiModalProcessorOnlyCache(made.info.ctx.model_config)
    cache.invalidate = forgotten.append  # type: ignore[method-assign]
    inputs.cache = cache
    with pytest.raises(RequestFieldError):
        made.apply(inputs, TimingContext(enabled=False))
    assert len(forgotten) == 1


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 2000))
def test_no_frame_has_more_tokens_than_the_limit(height: int, width: int, tokens: int) -> None:
    """As the model's processor resizes it. Frames so thin that one row of tokens is too long are refused."""
    if max(height, width) / min(height, width) > 200:
        return
    pixels = tokens * 784 + 3
    resized = smart_resize(height, width, 28, min(3136, pixels), pixels)
    grid = VideoGrid(1, resized[0] // 28, resized[1] // 28)
    if tokens >= 200:
        assert grid.num_tokens <= tokens
    elif grid.num_tokens > tokens:
        assert 1 in (grid.h, grid.w) or tokens < 4
        with pytest.raises(RequestFieldError):
            VideoLimit(1, pixels, 28, 28 * tokens, tokens).check(grid)
