"""Frames to patches in one pass: transformers' video processors of Qwen and GLM without their copies of all pixels.

They copy a video three times: to channels first, to patches, and to join one video with no other. Frames that arrive as
bytes in the target size, to be normalised on the device, need only the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature


class OnePassMixin:
    """Put before a video processor of Qwen or GLM; gives exactly its output."""

    def _prepare_input_videos(self, videos: list[Any], *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """[F, 3, H, W] of each video; of frames as bytes a view."""
        if len(videos) == 1 and _is_rgb_bytes(videos[0]):
            return [torch.from_numpy(videos[0]).permute(0, 3, 1, 2)]
        return super()._prepare_input_videos(videos, *args, **kwargs)  # type: ignore[misc]

    def _preprocess(self, videos: list[torch.Tensor], **options: Any) -> BatchFeature:
        """Patches of the videos and their grids."""
        if len(videos) == 1 and not options["do_rescale"] and not options["do_normalize"]:
            merge_size, temporal = options["merge_size"], options["temporal_patch_size"]
            video = resized = videos[0][None]
            if options["do_resize"]:
                resized = self.resize(  # type: ignore[attr-defined]
                    videos=video,
                    size=options["size"],
                    resample=options["resample"],
                    factor=options["patch_size"] * merge_size,
                    temporal_factor=temporal,
                    cap_pixels_per_frame=bool(options.get("cap_pixels_per_frame")),
                )
            if resized is video or resized.data_ptr() == video.data_ptr():
                patches, *grid = self.patchify(  # type: ignore[attr-defined]
                    video, patch_size=options["patch_size"], merge_size=merge_size, temporal_patch_size=temporal
                )
                data = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
                return BatchFeature(data, tensor_type=options.get("return_tensors"))
        return super()._preprocess([video.contiguous() for video in videos], **options)  # type: ignore[misc]


def read_in_one_pass(processor: Any) -> Any:
    """The processor, whose videos take one pass from now on."""
    videos = processor.video_processor
    if not isinstance(videos, OnePassMixin):
        # The name stays: it says by which rule frames are resized.
        videos.__class__ = type(type(videos).__name__, (OnePassMixin, type(videos)), {})
    return processor


def _is_rgb_bytes(video: Any) -> bool:
    """Frames [F, H, W, 3], and not by accident [F, 3, H, W] with three columns."""
    return (
        isinstance(video, np.ndarray)
        and video.dtype == np.uint8
        and video.ndim == 4
        and video.shape[3] == 3
        and video.shape[1] not in (1, 3)
    )
