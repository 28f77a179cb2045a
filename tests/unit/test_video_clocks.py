"""What the models' processors make of our frames: their clocks say the truth, and they do not scale them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize as qwen2_size
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as qwen3_size
from transformers.video_utils import VideoMetadata

from score_vllm.video import DecodedVideo, Resize, VideoError, decode_video
from tests.video_clips import make
from tests.video_writing import even, number_of, recipe, write


def metadata_of(video: DecodedVideo) -> VideoMetadata:
    fields = video.metadata()
    assert fields.pop("do_sample_frames") is False
    return VideoMetadata(**fields)


@pytest.mark.parametrize(
    ("kind", "container", "options"),
    [
        ("constant rate", "mp4", {}),
        ("variable rate", "webm", {}),
        ("header rate lies", "matroska", {}),
        ("offset start", "mpegts", {}),
        ("edit list", "mp4", {}),
        ("no duration", "webm", {}),
        ("joined", "mpegts", {}),
        ("constant rate", "mp4", {"max_frames": 4}),
        ("constant rate", "mp4", {"start": 2.0, "end": 5.0}),
        ("constant rate", "mp4", {"start": 5.2}),
        ("constant rate", "mp4", {"fps": 3.0}),
        ("constant rate", "mp4", {"fps": None, "max_frames": 8}),
        ("one picture", "mp4", {}),
    ],
)
def test_clocks_of_both_families(kind: str, container: str, options: dict[str, Any]) -> None:
    data, truth = make(kind, container)
    video = decode_video(data, **options)
    metadata = metadata_of(video)
    # Qwen2.5-VL: seconds per cell of two frames (processing_qwen2_5_vl.py: temporal_patch_size / sampled_fps).
    second_per_grid = 2 / metadata.sampled_fps
    assert second_per_grid == pytest.approx(2 * video.step, rel=1e-9)
    # Qwen3-VL: index / fps, the mean of a cell's two.
    np.testing.assert_allclose(metadata.timestamps, video.times, atol=video.step / 1000)
    half_a_frame = max(np.diff(truth.stamps), default=0.1) / 2
    for cell in range(len(video.frames) // 2):
        says = video.times[0] + cell * second_per_grid  # the model counts from the first frame read
        frame = video.frames[2 * cell]
        assert number_of(frame) in truth.shown(video.times[2 * cell])
        assert abs(says - video.times[2 * cell]) <= max(half_a_frame, second_per_grid / 2), "the clock does not drift"


@pytest.mark.parametrize("container", ["mp4", "webm", "mpegts"])
def test_second_per_grid_is_exact_at_the_default_rate(container: str) -> None:
    data, _ = make("constant rate", container)
    assert 2 / metadata_of(decode_video(data)).sampled_fps == 1.0


sizes = st.integers(1, 5000)


@settings(max_examples=300)
@given(st.integers(1, 200), sizes, sizes, st.integers(1, 20), st.integers(20, 2000), st.booleans())
def test_sizes_are_the_processors(frames: int, height: int, width: int, low: int, high: int, capped: bool) -> None:
    size = {"shortest_edge": low * 28 * 28, "longest_edge": high * 28 * 28}
    for kind in (Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, Glm4vVideoProcessor, Glm46VVideoProcessor):
        options = {"cap_pixels_per_frame": capped} if kind.__name__.startswith("Qwen") else {}
        processor = kind(size=dict(size), **options)
        rule = Resize.for_processor(processor)
        assert rule is not None
        if kind is not Qwen2VLVideoProcessor and frames < 2:
            continue
        try:
            ours = rule.size(frames, height, width)
        except VideoError:
            ours = None
        # The processor's own method, on a video that has no memory.
        video = torch.empty((1, frames, 3, height, width), device="meta")
        factor = processor.patch_size * processor.merge_size
        try:
            theirs = processor.resize(
                video,
                processor.size,
                None,
                factor=factor,
                temporal_factor=processor.temporal_patch_size,
                **options,
            ).shape[-2:]
        except ValueError:
            theirs = None
        assert ours == (tuple(theirs) if theirs else None)


def test_sizes_without_a_cap_are_smart_resizes() -> None:
    rule = Resize.for_processor(Qwen2VLVideoProcessor(cap_pixels_per_frame=False))
    assert rule is not None
    assert rule.size(64, 2160, 3840) == qwen2_size(2160, 3840, 28, rule.min_pixels, rule.max_pixels)
    rule = Resize.for_processor(Qwen3VLVideoProcessor(cap_pixels_per_frame=False))
    assert rule is not None
    assert rule.size(64, 2160, 3840) == qwen3_size(64, 2160, 3840, 2, 32, rule.min_pixels, rule.max_pixels)
    assert Resize(**rule.to_json()) == rule
    assert Resize.for_processor(object()) is None


@pytest.mark.parametrize("kind", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_scaled_frames_are_not_scaled_again_and_hardly_differ(kind: type) -> None:
    """The same grid, and pixels within what another bicubic filter makes of them."""
    processor = kind(size={"shortest_edge": 28 * 28, "longest_edge": 140 * 140}, cap_pixels_per_frame=False)
    data = write(recipe("mp4", even(40, 10), size=(480, 320)))
    rule = Resize.for_processor(processor)
    full, scaled = decode_video(data), decode_video(data, resize=rule)
    assert rule is not None
    assert scaled.frames.shape[1:3] == rule.size(len(full.frames), 320, 480)
    assert scaled.source_size == full.source_size == (480, 320)
    out = [
        processor([torch.from_numpy(v.frames).permute(0, 3, 1, 2)], return_tensors="pt", do_sample_frames=False)
        for v in (full, scaled)
    ]
    assert torch.equal(out[0]["video_grid_thw"], out[1]["video_grid_thw"])
    difference = (out[0]["pixel_values_videos"] - out[1]["pixel_values_videos"]).abs().mean()
    assert difference < 0.03, difference


def test_extreme_shapes_are_refused_in_one_sentence() -> None:
    rule = Resize(28, 28 * 28, 768 * 28 * 28)
    with pytest.raises(VideoError, match="3840x16: the longer side may be at most 200 times the other"):
        rule.size(4, 16, 3840)
