"""Synthetic video tokens: costs are real, what is selected means nothing."""

from __future__ import annotations

import torch

SCENE_FRAMES = 16


def scene_tokens(frames: int, per_frame: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """[T, N, D] tokens of scenes of 16 frames: each place keeps its vector but for noise; an eighth moves.

    The tokens of a scene have a mean in common, as real ones do, so that its frames are alike as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(frames, per_frame, d, dtype=dtype, device=device)
    scene = shared = torch.empty(0)
    for t in range(frames):
        if t % SCENE_FRAMES == 0:
            shared = 0.5 * torch.randn(d, generator=generator)
            scene = shared + torch.randn(per_frame, d, generator=generator)
        frame = scene + 0.4 * torch.randn(per_frame, d, generator=generator)
        moving = torch.randperm(per_frame, generator=generator)[: per_frame // 8]
        frame[moving] = shared + torch.randn(len(moving), d, generator=generator)
        x[t] = frame.to(dtype)
    return x
