"""The value types that pass between modules. They check themselves on construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class VideoGrid:
    """The token grid of one video after the vision tower's merger.

    Attributes:
        t: temporal cells (T of the paper; Qwen2.5-VL merges 2 frames into 1).
        h: token rows per cell.
        w: token columns per cell. N = h * w.
    """

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        for name in ("t", "h", "w"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"VideoGrid.{name} must be an integer >= 1, got {value!r}")

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.h * self.w

    @property
    def num_tokens(self) -> int:
        """T * N."""
        return self.t * self.h * self.w


@dataclass(frozen=True, slots=True, eq=False)
class TokenSelection:
    """What a method kept of one video.

    Attributes:
        indices: [K] int64, flat index ``t * N + n`` of each kept token; ascending and each
            once, except in a ``reference`` mode: there they stand as the published code emits them.
        embeddings: [K, D] rows handed to the LLM, in the dtype of the input. For selecting methods they
            are ``x.reshape(T * N, D)[indices]``; merging methods write merged rows.
        scores: [T * N] float32, higher is kept first; inside a frame or segment where the method gives each
            its own budget.
        num_frames: T.
        tokens_per_frame: N.
    """

    indices: torch.Tensor
    embeddings: torch.Tensor
    scores: torch.Tensor
    num_frames: int
    tokens_per_frame: int

    def __post_init__(self) -> None:
        total = self.num_frames * self.tokens_per_frame
        if self.indices.ndim != 1 or self.indices.dtype != torch.int64:
            raise ValueError(
                f"TokenSelection.indices must be [K] int64, got {tuple(self.indices.shape)} {self.indices.dtype}"
            )
        if self.embeddings.ndim != 2 or self.embeddings.shape[0] != self.indices.shape[0]:
            raise ValueError(
                f"TokenSelection.embeddings must be [K={self.indices.shape[0]}, D], got {tuple(self.embeddings.shape)}"
            )
        if self.scores.shape != (total,) or self.scores.dtype != torch.float32:
            raise ValueError(
                f"TokenSelection.scores must be [{total}] float32, got {tuple(self.scores.shape)} {self.scores.dtype}"
            )
        if not self.indices.shape[0]:
            raise ValueError(f"TokenSelection keeps 0 of {total} tokens; must keep at least 1")

    @property
    def num_retained(self) -> int:
        """K."""
        return int(self.indices.shape[0])

    def kept_per_frame(self) -> torch.Tensor:
        """[T] int64: how many tokens each temporal cell keeps."""
        return torch.bincount(self.indices // self.tokens_per_frame, minlength=self.num_frames)

    def __repr__(self) -> str:
        return (
            f"TokenSelection(K={self.num_retained} of T*N={self.num_frames}*{self.tokens_per_frame}, "
            f"D={self.embeddings.shape[1]}, dtype={self.embeddings.dtype})"
        )
