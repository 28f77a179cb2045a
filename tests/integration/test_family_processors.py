"""Every family's processor inside vLLM, without an engine: limits, spans, and what passes through several videos."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache

from score_vllm import num_retained_tokens
from score_vllm.layout import VideoLayout
from score_vllm.models.processing import (
    CELLS_KEY,
    IDENTITY_KEY,
    LAYOUT_KEY,
    NUM_RETAINED_KEY,
    REPORT_KEY,
    RequestFieldError,
    identity_of,
)
from score_vllm.models.video_options import SampledMetadata
from score_vllm.vision.cell_cache import count_distinct

from .family_oracle import random_video
from .test_admission import processor
from .tiny_families import HIDDEN, build_llava, build_qwen3
from .tiny_glm_internvl import GLM_TOKENS, build_glm, build_internvl

QWEN, GLM = "<|vision_start|><|video_pad|><|vision_end|>", "".join(GLM_TOKENS[3:])
LLAVA_VIDEO = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
FAMILIES: dict[str, tuple[Any, str]] = {
    "qwen3_vl": (partial(build_qwen3, kind="qwen3_vl"), QWEN),
    "glm4v": (build_glm, GLM),
    "glm4v_moe": (partial(build_glm, kind="glm4v_moe"), GLM),
    "llava_video": (partial(build_llava, **LLAVA_VIDEO), "<video>"),
    "internvl": (build_internvl, "<video>"),
}
GLMS = pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    build, video = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param) / "model"
    build(directory)
    return request.param, directory, video


def process(made: Any, prompt: str, videos: list[Any], ratio: float = 1.0, cache: Any = None) -> Any:
    items = made.info.parse_mm_data({"video": videos})
    return made(prompt, mm_items=items, hf_processor_mm_kwargs={"retention_ratio": ratio}, cache=cache)


def test_profiled_and_admitted_are_one_number(family: Any) -> None:
    name, directory, _ = family
    made = processor(directory, max_frames=7 if name.startswith("glm") else 8)
    limit = made.info.video_limit
    (profiled,) = made.get_dummy_mm_inputs({"video": 1})["mm_kwargs"]["video"]
    layout = VideoLayout.from_tensor(profiled[LAYOUT_KEY].data)
    assert layout.grid.num_tokens == int(profiled[NUM_RETAINED_KEY].data) == limit.tokens
    assert count_distinct(profiled[CELLS_KEY].data) == layout.grid.t, "every cell is encoded in the profile"
    assert layout.structure_tokens <= limit.structure_tokens
    reserved = made.info.get_mm_max_tokens_per_item(4096, {"video": 1})
    if reserved is None:  # vLLM then reserves what the profile has
        assert layout.structure_tokens == limit.structure_tokens
    else:
        assert reserved["video"] == limit.tokens + limit.structure_tokens


def test_longer_videos_are_refused(family: Any) -> None:
    """Qwen3-VL's and GLM's processors make frames smaller as they get more, down to one token."""
    name, directory, video = family
    shrinks = name in ("qwen3_vl", "glm4v", "glm4v_moe")
    made = processor(directory, max_frames=4, max_pixels=64 * 32 * 32)
    process(made, video, [random_video(4, 640, 640, seed=1)])
    with pytest.raises(RequestFieldError, match="this server admits at most"):
        process(made, video, [random_video(400 if shrinks else 5, 56, 56, seed=2)])


@GLMS
@pytest.mark.parametrize("size", [(60, 1900), (1400, 90), (333, 777), (28, 28)])
def test_no_shape_has_more_tokens_than_the_limit(size: tuple[int, int], family: Any) -> None:
    _, directory, video = family
    made = processor(directory, max_frames=6, max_pixels=100 * 28 * 28)
    assert made.info.video_limit.tokens == 3 * 100
    (report,) = process(made, video, [random_video(6, *size, seed=3)])[REPORT_KEY]
    assert 4 <= report.grid.num_tokens <= 300


def test_embeddings_without_a_layout_are_refused(family: Any) -> None:
    _, directory, video = family
    made = processor(directory, enable_mm_embeds=True)
    if made.takes_embeddings:
        pytest.skip("Qwen's embeddings come with their grids")
    with pytest.raises(RequestFieldError, match="video_embeds cannot be compressed with this model"):
        process(made, video, [torch.rand(16, HIDDEN)])


@GLMS
def test_times_are_the_processor_s_own(family: Any) -> None:
    """Two videos in one prompt; GLM-4.6V's cells that begin between whole seconds, and a picture read twice."""
    name, directory, video = family
    made = processor(directory, max_frames=16)
    tokenizer = made.info.get_tokenizer()
    first, second = random_video(8, 84, 84, seed=4, fps=1.6), random_video(6, 56, 112, seed=5, fps=2.0)
    second[1]["frames_indices"][-1] = second[1]["frames_indices"][-2]
    made_of = process(made, f"a {video} b {video}", [first, second], ratio=0.5)
    starts = {
        "glm4v": [["0", "1", "2", "3"], ["0", "1", "2"]],
        "glm4v_moe": [[f"{second:.1f} seconds" for second in cells] for cells in ([0, 1.25, 2.5, 3.75], [0, 1, 2])],
    }
    for item, texts, report in zip(made_of["mm_kwargs"]["video"], starts[name], made_of[REPORT_KEY], strict=True):
        layout = VideoLayout.from_tensor(item[LAYOUT_KEY].data)
        assert report.retained_tokens == num_retained_tokens(layout.grid.num_tokens, 0.5)
        begin, end = GLM_TOKENS[0], GLM_TOKENS[2]
        assert tokenizer.decode(layout.ids) == "".join(f"{begin}{end}{text}" for text in texts)
    rows = tokenizer.convert_tokens_to_ids("<|image|>")
    kept = sum(report.retained_tokens for report in made_of[REPORT_KEY])
    assert np.count_nonzero(np.array(made_of["prompt_token_ids"]) == rows) == kept


def test_identity_and_what_was_read_come_with_every_video_cached_or_not(family: Any) -> None:
    """The identity goes to the worker with the item, and to the response with the report."""
    _, directory, video = family
    made = processor(directory, max_frames=16)
    caches = [None, MultiModalProcessorOnlyCache(made.info.ctx.model_config)]
    videos = []
    for seed, count in ((6, 8), (7, 6)):
        frames, metadata = random_video(count, 84, 84, seed=seed)
        videos.append((frames, SampledMetadata(metadata, {"frames": count}, [second / 2 for second in range(count)])))
    digests = set()
    for cache in (*caches, caches[1]):
        for one, other in (videos, videos[::-1]):  # the second prompt comes out of the cache
            result = process(made, f"a {video} b {video}", [one, other], ratio=0.5, cache=cache)
            carried = [identity_of(item[IDENTITY_KEY].data) for item in result["mm_kwargs"]["video"]]
            reports = result[REPORT_KEY]
            assert carried == [report.identity for report in reports] == result["mm_hashes"]["video"]
            digests |= set(carried)
            for (frames, _), report in zip((one, other), reports, strict=True):
                assert report.read == {"frames": len(frames)}
                assert report.cell_seconds == [cell * len(frames) / report.grid.t / 2 for cell in range(report.grid.t)]
    assert len(digests) == 2
    (less,) = process(made, video, videos[:1], ratio=0.4)[REPORT_KEY]
    assert less.identity not in digests
