"""Clips of the drawn world, rendered and run through the demo's vision tower, for its language stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from score_vllm.train.world.equal_windows import batch_equal_windows
from score_vllm.train.world.language_stage import Clip
from score_vllm.train.world.render import render
from score_vllm.train.world.scenes import Scene, caption, clip_rng, make_pseudo_scene, make_scene, questions
from score_vllm.train.world.vision_stage import GRID, TOKEN, pixel_rows, through_codec
from score_vllm.types import VideoGrid


@torch.inference_mode()
def encode_clip(tower: Any, scene: Scene, codec: bool) -> Clip:
    """Render one scene and run the vision tower over it."""
    rendering = render(scene)
    frames = through_codec(rendering.frames) if codec else rendering.frames
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    num_cells = len(frames) // 2
    with torch.autocast("cpu", torch.bfloat16):
        x = tower(pixel_rows(frames), grid_thw=torch.tensor([[num_cells, 2 * GRID, 2 * GRID]])).pooler_output
    seen = rendering.seen
    if len(seen) % 2:
        seen = np.concatenate([seen, seen[-1:]])
    tiles = seen.reshape(num_cells, 2, GRID, TOKEN, GRID, TOKEN).max(axis=(1, 3, 5)).reshape(-1)
    return Clip(
        x.bfloat16(),
        (torch.from_numpy(tiles > 0).float(),),
        VideoGrid(num_cells, GRID, GRID),
        caption(scene),
        lambda rng: [] if scene.texts else questions(scene, rng),
    )


def encode_pool(tower: Any, split: str, count: int, first: int = 0) -> list[Clip]:
    """``count`` encoded clips of a split; every eighth is a pseudo-video."""
    batch_equal_windows(tower)
    pool = []
    for index in tqdm(range(first, first + count), desc=f"encoding {split} clips", unit="clip", mininterval=10):
        rng = clip_rng(split, index)
        scene = make_pseudo_scene(rng) if index % 8 == 7 else make_scene(rng)
        pool.append(encode_clip(tower, scene, codec=index % 4 == 0))
    return pool
