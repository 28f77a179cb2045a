"""What decoding gives: frames with their times, and their description for the model's processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Ticks of the clock in `metadata` per step between frames.
_TICKS_PER_STEP = 1000


@dataclass(frozen=True, slots=True, eq=False)
class DecodedVideo:
    """Sampled frames of a video.

    Attributes:
        frames: [F, H, W, 3] uint8 RGB, upright, square pixels.
        times: [F] float64, seconds from the source's first picture; ascending; then the frame is on screen.
        step: seconds between frames on the sampling grid (the mean where frames were left out).
        window: ``(start, end)`` in seconds, what was read of the source.
        duration: seconds of the source.
        total_frames: pictures of the source that are shown.
        source_fps: their mean number per second.
        source_size: ``(width, height)`` as a player shows the first frame, before any scaling.
        warnings: what was repaired, left out or could not be read; empty for a sound file.
        damaged: the decoder lost or concealed pictures; what it shows for them depends on its number of threads.
    """

    frames: np.ndarray
    times: np.ndarray
    step: float
    window: tuple[float, float]
    duration: float
    total_frames: int
    source_fps: float
    source_size: tuple[int, int]
    warnings: tuple[str, ...] = ()
    damaged: bool = False

    def metadata(self, loader: str = "score_pyav") -> dict[str, Any]:
        """The metadata that vLLM's video inputs and transformers' processors expect beside the frames.

        They know no time stamps, only indices and a rate. So the indices are ticks of a clock with 1000 ticks per
        step: Qwen2.5-VL's ``second_per_grid_ts`` becomes twice ``step``, Qwen3-VL's timestamps the ``times``.
        """
        rate = _TICKS_PER_STEP / self.step
        return {
            "total_num_frames": len(self.frames) * _TICKS_PER_STEP,
            "fps": rate,
            "duration": len(self.frames) * self.step,
            "video_backend": loader,
            "frames_indices": np.rint(self.times * rate).astype(int).tolist(),
            # The frames are chosen; the model's processor must not choose again.
            "do_sample_frames": False,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything but the frames."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "frames"}
        return {**fields, "times": self.times.tolist()}

    @classmethod
    def from_json(cls, frames: np.ndarray, fields: dict[str, Any]) -> DecodedVideo:
        """The other way round."""
        for name in ("window", "source_size", "warnings"):
            fields[name] = tuple(fields[name])
        return cls(frames, **{**fields, "times": np.array(fields["times"], dtype=np.float64)})

    def report(self) -> dict[str, Any]:
        """What was read, JSON-able."""
        return {
            "duration": round(self.duration, 3),
            "window": [round(t, 3) for t in self.window],
            "frames": len(self.frames),
            "first": round(float(self.times[0]), 3),
            "last": round(float(self.times[-1]), 3),
            "step": round(self.step, 6),
            "source_frames": self.total_frames,
            "source_fps": round(self.source_fps, 3),
            "source_size": list(self.source_size),
            "warnings": list(self.warnings),
        }
