"""Videos pass through the processors of Qwen and GLM once, and come out as transformers' own make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("vllm")
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.glm46v.video_processing_glm46v import Glm46VVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from score_vllm.models.one_pass import OnePassMixin
from tests.integration.test_admission import process, processor

SIDE = {Qwen2VLVideoProcessor: 28, Qwen3VLVideoProcessor: 32, Glm4vVideoProcessor: 28, Glm46VVideoProcessor: 28}
KINDS = tuple(SIDE)


class FullWrites(TorchDispatchMode):
    """Counts operations that write a whole video anew."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.names += [str(func)] * (made.untyped_storage().nbytes() >= self.size // 2)
        return out


def frames_of(kind: type, count: int, rows: int = 3, columns: int = 5, seed: int = 0) -> np.ndarray:
    shape = (count, rows * SIDE[kind], columns * SIDE[kind], 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["bytes", "odd", "resized", "normalised", "floats", "planes", "two", "three high"])
def test_the_output_is_transformers_own(kind: Any, case: str) -> None:
    size = {"shortest_edge": 4 * SIDE[kind] ** 2, "longest_edge": 400 * SIDE[kind] ** 2}
    made: Any = type(kind.__name__, (OnePassMixin, kind), {})(size=size, do_sample_frames=False)
    own = kind(size=size, do_sample_frames=False)
    frames = frames_of(kind, 7 if case == "odd" else 8)
    videos: list[Any] = [frames]
    options = {} if case == "normalised" else {"do_rescale": False, "do_normalize": False}
    if case == "resized":
        videos = [frames[:, :-9, :-5].copy()]
    elif case == "floats":
        videos = [frames.astype(np.float32)]
    elif case == "planes":
        videos = [frames.transpose(0, 3, 1, 2).copy()]
    elif case == "two":
        videos = [frames, frames_of(kind, 4, seed=1)]
    elif case == "three high":
        videos = [frames[:, :3].copy()]
    try:
        expected = own(videos, return_tensors="pt", **options)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20].replace("(", ".")):
            made(videos, return_tensors="pt", **options)
        return
    found = made(videos, return_tensors="pt", **options)
    assert set(found) == set(expected)
    assert torch.equal(found["video_grid_thw"], expected["video_grid_thw"])
    assert found["pixel_values_videos"].dtype == expected["pixel_values_videos"].dtype
    assert torch.equal(found["pixel_values_videos"], expected["pixel_values_videos"])


def test_a_request_writes_its_pixels_once(tiny_model: Path) -> None:
    """From decoded frames to what goes to the engine; transformers' own processor does it three times."""
    made = processor(tiny_model, max_frames=16)
    frames = frames_of(Qwen2VLVideoProcessor, 16, 8, 8)
    metadata = {"total_num_frames": 16, "fps": 2.0, "duration": 8.0, "video_backend": "test"}
    metadata |= {"frames_indices": list(range(16)), "do_sample_frames": False}
    process(made, (frames, metadata))
    with FullWrites(frames.nbytes) as writes:
        out = process(made, (frames, metadata), ratio=0.5)
    pixels = out["mm_kwargs"]["video"][0]["pixel_values_videos"].data
    assert pixels.dtype == torch.uint8, "normalised on the device"
    assert len(writes.names) == 1, writes.names
    with FullWrites(frames.nbytes) as writes:
        plain = Qwen2VLVideoProcessor(do_sample_frames=False)
        plain([frames], do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert len(writes.names) == 3, "the processor has become better: is our own still needed?"
