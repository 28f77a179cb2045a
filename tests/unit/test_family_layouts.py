"""Layouts against each family's own processor and rope function, for sizes that do not divide evenly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from score_vllm.layout import VideoLayout, grid_layout, timestamped_layout
from score_vllm.types import VideoGrid
from score_vllm.vision.glm import cell_seconds, glm_layout
from score_vllm.vision.internvl import internvl_layout, units
from score_vllm.vision.pooling import frames_layout, pool_frames
from tests.integration.family_oracle import random_video
from tests.integration.tiny_families import build_llava, build_qwen2_vl, build_qwen3
from tests.integration.tiny_glm_internvl import build_glm, build_internvl

SIZES = [(2, 64, 64, 2.0), (7, 100, 150, 2.0), (16, 97, 65, 0.7), (33, 128, 40, 29.97), (12, 200, 64, 0.01)]


def unpruned_ids(layout: VideoLayout, video_token: int) -> list[int]:
    out = np.full(layout.structure_tokens + layout.grid.num_tokens, video_token)
    out[layout.slots] = layout.ids
    return out.tolist()


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    directory = tmp_path_factory.mktemp("tiny") / request.param
    build_qwen3(directory, request.param)
    model_class = {"qwen3_vl": tf.Qwen3VLForConditionalGeneration, "qwen3_5": tf.Qwen3_5ForConditionalGeneration}
    return model_class[request.param].from_pretrained(directory), tf.AutoProcessor.from_pretrained(directory)


@pytest.mark.parametrize(("num_frames", "height", "width", "fps"), SIZES)
def test_qwen3(num_frames: int, height: int, width: int, fps: float, qwen3: Any) -> None:
    model, processor = qwen3
    frames, metadata = random_video(num_frames, height, width, seed=num_frames, fps=fps)
    metadata.pop("do_sample_frames")
    inputs = processor(
        text=["Before <|vision_start|><|video_pad|><|vision_end|> after"],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ids, grid_thw = inputs["input_ids"], inputs["video_grid_thw"]
    positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], video_grid_thw=grid_thw)
    config = model.config
    t, h, w = grid_thw[0].tolist()
    # The seconds of a cell lie midway between its two frames; an odd last frame is doubled.
    stamps = [i / fps for i in [*range(num_frames), num_frames - 1][: 2 * t]]
    cells = [(a + b) / 2 for a, b in zip(stamps[::2], stamps[1::2], strict=True)]
    encode = partial(processor.tokenizer.encode, add_special_tokens=False)
    markers = config.vision_start_token_id, config.vision_end_token_id
    layout = timestamped_layout(VideoGrid(t, h // 2, w // 2), cells, encode, *markers)
    prefix = len(encode("Before <|vision_start|>"))
    span = unpruned_ids(layout, config.video_token_id)
    assert ids[0, prefix : prefix + len(span)].tolist() == span
    offsets = positions[:, 0, prefix : prefix + len(span)].numpy() - prefix
    assert np.array_equal(offsets, layout.unpruned_offsets().T)
    assert int(positions[0, 0, prefix + len(span)]) == prefix + layout.extent


@pytest.mark.parametrize(("num_frames", "height", "width"), [(2, 84, 84), (7, 100, 150), (5, 57, 200)])
def test_qwen2(num_frames: int, height: int, width: int, tmp_path: Path) -> None:
    build_qwen2_vl(tmp_path / "model")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "model")
    model = tf.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    frames, _ = random_video(num_frames, height, width, seed=1)
    inputs = processor(
        text=["x<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    grid_thw = inputs["video_grid_thw"]
    positions, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=grid_thw)
    t, h, w = grid_thw[0].tolist()
    layout = grid_layout(VideoGrid(t, h // 2, w // 2), 1.0)
    assert np.array_equal(positions[:, 0, 2:-1].numpy() - 2, layout.unpruned_offsets().T)
    assert int(positions[0, 0, -1]) == 2 + layout.extent


def test_llava_onevision(tmp_path: Path) -> None:
    """Length of the span by the processor, features by the model."""
    build_llava(tmp_path / "model")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "model")
    model = tf.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "model")
    frames, _ = random_video(5, 97, 65, seed=2)
    inputs = processor(text=["x<video>y"], videos=[list(frames)], return_tensors="pt")
    layout = frames_layout(model.config, 5)
    count = int((inputs["input_ids"] == model.config.video_token_index).sum())
    assert count == layout.structure_tokens + layout.grid.num_tokens == layout.extent
    assert layout.slots.tolist() == [count - 1]
    x = torch.randn(5, 81, 32)
    torch.testing.assert_close(pool_frames(model.config, x), model.model.apply_pooling(x))


def test_llava_video_by_hand() -> None:
    """27 x 27 patches: 13 x 13 averages and a newline after each row; 64 frames take 11,648 slots."""
    from types import SimpleNamespace

    vision = SimpleNamespace(image_size=384, patch_size=14)
    config = SimpleNamespace(vision_config=vision, mm_newline_position="grid", mm_spatial_pool_mode="average")
    layout = frames_layout(config, 64)
    assert (layout.grid, layout.structure_tokens, layout.extent) == (VideoGrid(64, 13, 13), 832, 11_648)
    assert layout.slots[:14].tolist() == [*range(13, 182, 14), 195]
    x = torch.arange(729.0).view(1, 729, 1)
    pooled = pool_frames(config, x)[0, :, 0].view(13, 13)
    assert pooled[2, 5] == np.mean([27 * r + c for r in (4, 5) for c in (10, 11)])
    for name in ("mm_newline_position", "mm_spatial_pool_mode"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            frames_layout(SimpleNamespace(**{**vars(config), name: "spiral"}), 2)


@pytest.fixture(scope="module", params=["glm4v", "glm4v_moe"])
def glm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """GLM-4.1V writes whole seconds, GLM-4.6V decimals."""
    directory = tmp_path_factory.mktemp("tiny") / request.param
    build_glm(directory, request.param)
    return tf.AutoModelForImageTextToText.from_pretrained(directory), tf.AutoProcessor.from_pretrained(directory)


@pytest.mark.parametrize(("num_frames", "height", "width", "fps"), SIZES)
def test_glm(num_frames: int, height: int, width: int, fps: float, glm: Any) -> None:
    model, processor = glm
    assert type(processor).__name__ == ("Glm46VProcessor" if "moe" in model.config.model_type else "Glm4vProcessor")
    frames, metadata = random_video(num_frames, height, width, seed=num_frames, fps=fps)
    # A picture that stays on screen is read twice.
    metadata["frames_indices"][-1] = metadata["frames_indices"][-2]
    metadata.pop("do_sample_frames")
    inputs = processor(
        text=["Before <|begin_of_video|><|video|><|end_of_video|> after"],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ids, grid_thw = inputs["input_ids"], inputs["video_grid_thw"]
    positions, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], video_grid_thw=grid_thw)
    t, h, w = grid_thw[0].tolist()
    encode = partial(processor.tokenizer.encode, add_special_tokens=False)
    seconds = cell_seconds([index / fps for index in metadata["frames_indices"]], t)
    layout = glm_layout(VideoGrid(t, h // 2, w // 2), seconds, encode, model.config, processor)
    prefix = len(encode("Before <|begin_of_video|>"))
    span = unpruned_ids(layout, model.config.image_token_id)
    assert ids[0, prefix : prefix + len(span)].tolist() == span
    offsets = positions[:, 0, prefix : prefix + len(span)].numpy() - prefix
    assert np.array_equal(offsets, layout.unpruned_offsets().T)
    assert int(positions[0, 0, prefix + len(span)]) == prefix + layout.extent


@pytest.mark.parametrize("num_frames", [1, 2, 11])
def test_internvl(num_frames: int, tmp_path: Path) -> None:
    build_internvl(tmp_path / "model")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "model")
    config = tf.AutoConfig.from_pretrained(tmp_path / "model")
    frames, _ = random_video(num_frames, 97, 65, seed=2)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    ids = processor(text=["x<video>y"], videos=[video], return_tensors="pt")["input_ids"][0].tolist()
    encode = partial(processor.tokenizer.encode, add_special_tokens=False)
    layout = internvl_layout(num_frames, encode, config, processor)
    assert (layout.grid, layout.extent) == (VideoGrid(num_frames, 4, 4), len(ids) - 2)
    assert ids[1:-1] == unpruned_ids(layout, processor.image_token_id)
    assert np.array_equal(layout.unpruned_offsets(), np.arange(layout.extent)[:, None].repeat(3, axis=1))
    # The patches of a token, by their row and column.
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patches = torch.cat([torch.full((1, 2), -1), torch.stack([rows, columns], dim=-1).flatten(0, 1)])
    grouped = units(patches[None, :, None].float(), config).view(16, 4, 2)
    assert grouped[6].tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
