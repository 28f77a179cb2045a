"""The largest video that a server admits: one number for the memory profile, the encoder cache, the scheduler and the
refusal. It counts what the vision tower encodes, T * N, so that every retention ratio fits for every video let in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from score_vllm.config import ServingConfig
from score_vllm.models.one_pass import read_in_one_pass
from score_vllm.models.processing import RequestFieldError
from score_vllm.types import VideoGrid
from score_vllm.video.sampling import DEFAULT_CELL_TOKENS


@dataclass(frozen=True, slots=True)
class VideoLimit:
    """What ``--max-frames`` and ``--max-pixels`` allow together.

    Attributes:
        max_frames: frames of a video.
        max_pixels: pixels of a frame after the model's processor has resized it; None where all frames have one size.
        height, width: pixels of a frame with the most tokens.
        tokens: T * N of ``max_frames`` such frames.
        structure_tokens: S of such a video: rows beside its visual tokens.
    """

    max_frames: int
    max_pixels: int | None
    height: int
    width: int
    tokens: int
    structure_tokens: int = 0

    def check(self, grid: VideoGrid) -> None:
        """Refuse what memory is not reserved for.

        Raises:
            RequestFieldError: the video has more tokens; names both numbers and the flags.
        """
        if grid.num_tokens > self.tokens:
            pixels = "" if self.max_pixels is None else f", --max-pixels {self.max_pixels}"
            raise RequestFieldError(
                f"the video has {grid.num_tokens} visual tokens ({grid.t} x {grid.h} x {grid.w}) before compression, "
                f"and this server admits at most {self.tokens} (--max-frames {self.max_frames}{pixels}); "
                "send fewer or smaller frames",
                "video_url",
            )


class AdmissionInfoMixin:
    """Put before a family's processing info, with :attr:`video_limit`; inert where nothing is compressed."""

    ctx: Any
    video_limit: Any

    @cached_property
    def _serving(self) -> ServingConfig | None:
        return ServingConfig.from_hf_config(self.ctx.model_config.hf_config)

    @property
    def serving(self) -> ServingConfig:
        """Only where videos are compressed."""
        assert self._serving is not None
        return self._serving

    def resolve_video_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's options for a request, with videos under the server's limit."""
        return dict(kwargs)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """vLLM sizes the encoder cache and a step's encoder budget by this."""
        limits: Any = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        if limits is None or self._serving is None or "video" not in limits:
            return limits
        return {**limits, "video": self.video_limit.tokens + self.video_limit.structure_tokens}


class FramePixelsInfoMixin(AdmissionInfoMixin):
    """For processors of the Qwen families, which make frames smaller until they fit ``size["longest_edge"]`` pixels."""

    def get_hf_processor(self, **kwargs: Any) -> Any:
        """The family's; where videos are compressed, they pass through it in one pass."""
        processor = super().get_hf_processor(**kwargs)  # type: ignore[misc]
        return processor if self._serving is None else read_in_one_pass(processor)

    def unit(self) -> int:
        """Pixels along one side of a visual token."""
        vision = self.get_hf_config().vision_config  # type: ignore[attr-defined]
        return vision.patch_size * vision.spatial_merge_size

    def cells(self) -> int:
        """T of a video of ``--max-frames``."""
        vision = self.get_hf_config().vision_config  # type: ignore[attr-defined]
        return -(-self.serving.max_frames // vision.temporal_patch_size)

    def frames_per_limit(self) -> int:
        """Frames that share the processor's limit of pixels."""
        return 1

    def max_structure_tokens(self) -> int:
        """S of the largest video."""
        return 0

    def resolve_video_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's options for a request, with videos under the pixel limit.

        Options of the operator (``--mm-processor-kwargs``) and of the request may lower the limit, not raise it.
        """
        resolved = self._merge_and_resolve_mm_processor_kwargs(kwargs)  # type: ignore[attr-defined]
        scope = dict(resolved.get("videos_kwargs") or {})
        default = dict(self.get_hf_processor().video_processor.size)  # type: ignore[attr-defined]
        per_frame = self.serving.max_pixels or DEFAULT_CELL_TOKENS * self.unit() ** 2
        cap = per_frame * self.frames_per_limit()
        if self.serving.max_pixels is not None:
            default["longest_edge"] = cap
        size = self._get_vision_size(scope, default)  # type: ignore[attr-defined]
        longest = min(size["longest_edge"], cap)
        # Down to a number of tokens that some frame has, or the profile would miss the largest video by a little.
        width, height = self.get_image_size_with_most_features(  # type: ignore[attr-defined]
            max_pixels=longest // self.frames_per_limit()
        )
        longest = width * height * self.frames_per_limit()
        shortest = min(size["shortest_edge"], longest)
        scope["size"] = {"shortest_edge": shortest, "longest_edge": longest}
        # Older names of the same limits would win over "size" inside the processor.
        scope |= {k: v for k, v in (("min_pixels", shortest), ("max_pixels", longest)) if k in scope}
        return {**resolved, "videos_kwargs": scope}

    @cached_property
    def video_limit(self) -> VideoLimit:
        """Of this server."""
        longest = self.resolve_video_kwargs({})["videos_kwargs"]["size"]["longest_edge"]
        pixels = longest // self.frames_per_limit()
        width, height = self.get_image_size_with_most_features(max_pixels=pixels)  # type: ignore[attr-defined]
        tokens = self.cells() * (height // self.unit()) * (width // self.unit())
        return VideoLimit(self.serving.max_frames, pixels, height, width, tokens, self.max_structure_tokens())


class AdmissionDummyInputsMixin:
    """Put before a family's builder of dummy inputs: memory is profiled with the largest video admitted."""

    info: Any

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """As vLLM's, with our video. Sizes in ``--limit-mm-per-prompt`` do not shrink it: they bind no request."""
        if self.info._serving is None:
            return super().get_dummy_mm_data(seq_len, mm_counts, mm_options)  # type: ignore[misc]
        data = super().get_dummy_mm_data(seq_len, {**mm_counts, "video": 0}, mm_options)  # type: ignore[misc]
        limit, number = self.info.video_limit, mm_counts.get("video", 0)
        videos = self._get_dummy_videos(  # type: ignore[attr-defined]
            width=limit.width, height=limit.height, num_frames=limit.max_frames, num_videos=number
        )
        for frames in (video[0] if isinstance(video, tuple) else video for video in videos):
            # All cells different, or one of them would be encoded and the profile would miss the rest.
            frames[:, 0] = np.random.default_rng(0).integers(0, 256, frames[:, 0].shape)
        return {**data, "video": videos}
