"""First stage of the demo model: its vision tower learns to say, token by token, what it looks at.

The generator knows which pixel shows what, so every merged token gets labels (shape, colour, direction, quarter,
letter) for a linear head on the embedding that the language model will see. Minutes on two cores, where learning to
see through the language model's answers alone takes hours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from score_vllm.train.world.equal_windows import batch_equal_windows
from score_vllm.train.world.render import FIRST_FLASH, Rendering, render
from score_vllm.train.world.scenes import (
    COLOURS,
    DIRECTIONS,
    FRAME_SIZE,
    LETTERS,
    PLATE_SIZE,
    SHAPES,
    Flash,
    Scene,
    Thing,
    clip_rng,
    make_pseudo_scene,
    make_scene,
)

TOKEN = 28
GRID = FRAME_SIZE // TOKEN
# Class 0 of every head is "ground".
HEADS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "direction": len(DIRECTIONS),
    "quarter": 4,
    "letter": len(LETTERS),
}
# A token is of a thing that covers this share of it, of the ground where nothing is seen, and unlabelled between.
MIN_COVER = 0.08
IGNORE = -100
# Of Qwen2-VL's processor, per channel.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def dense_labels(scene: Scene, rendering: Rendering) -> np.ndarray:
    """What each merged token shows.

    Args:
        scene: of an even number of frames.
        rendering: of that scene.

    Returns:
        [T, N, len(HEADS)] int64 class numbers, 0 for ground, -100 where a token is neither one nor the other.
    """
    num_cells = rendering.seen.shape[0] // 2
    tiles = rendering.seen[: 2 * num_cells].reshape(num_cells, 2, GRID, TOKEN, GRID, TOKEN)
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(num_cells, GRID * GRID, -1)
    labels = np.full((num_cells, GRID * GRID, len(HEADS)), IGNORE, np.int64)
    labels[(tiles == 0).all(-1)] = 0
    cover = np.zeros((num_cells, GRID * GRID))
    directions, colours = list(DIRECTIONS), list(COLOURS)
    for i, thing in enumerate(scene.things):
        share = (tiles == i + 1).mean(-1)
        mine = (share >= MIN_COVER) & (share > cover)
        cover[mine] = share[mine]
        fixed = [SHAPES.index(thing.shape) + 1, colours.index(thing.colour) + 1, directions.index(thing.direction) + 1]
        for cell in range(num_cells):
            x, y = thing.box(2 * cell)
            quarter = 1 + 2 * (y + thing.size / 2 > FRAME_SIZE / 2) + (x + thing.size / 2 > FRAME_SIZE / 2)
            labels[cell][mine[cell]] = [*fixed, quarter, 0]
    for i, flash in enumerate(scene.flashes):
        share = (tiles == FIRST_FLASH + i).mean(-1)
        mine = (share >= MIN_COVER) & (share > cover)
        cover[mine] = share[mine]
        labels[mine] = [0, 0, 0, 0, LETTERS.index(flash.letter) + 1]
    return labels


def through_codec(frames: np.ndarray) -> np.ndarray:
    """Frames after H.264, so that the tower has met what a real file does to them."""
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=2, options={"crf": "14", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def pixel_rows(frames: np.ndarray) -> torch.Tensor:
    """Frames as the vision tower's rows: what the video processor makes of them at their own size.

    Args:
        frames: [2T, 224, 224, 3] uint8.

    Returns:
        [T * 256, 1176] float32, patches of one merged token side by side.
    """
    x = torch.from_numpy(frames).float().div_(255).sub_(torch.tensor(MEAN)).div_(torch.tensor(STD))
    cells, patches = x.shape[0] // 2, FRAME_SIZE // 14
    x = x.view(cells, 2, patches // 2, 2, 14, patches // 2, 2, 14, 3)
    # cell, row of tokens, column of tokens, row and column in the token, channel, frame, pixel row, pixel column
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(cells * patches * patches, -1)


def crowded_scene(rng: np.random.Generator) -> Scene:
    """One temporal cell with up to nine shapes and letters: far more to learn per token than a real scene has."""
    things, flashes = [], []
    slot = FRAME_SIZE // 3
    for place in range(9):
        row, column = divmod(place, 3)
        kind = rng.random()
        size = int(rng.integers(44, 62)) if kind < 0.65 else PLATE_SIZE
        x, y = (int(v) for v in rng.integers(0, slot - size + 1, 2))
        if kind < 0.65:
            direction = str(rng.choice(list(DIRECTIONS))) if rng.random() < 0.7 else "still"
            dx, dy = DIRECTIONS[direction]
            left, top = (min(max(v, 6), FRAME_SIZE - size - 6) for v in (column * slot + x, row * slot + y))
            look = (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))
            things.append(Thing(*look, direction, size, 0, 2, left, top, float(rng.uniform(2.5, 6)) * (dx or dy != 0)))
        elif kind < 0.95:
            # A flash of one frame, or the end of one, fills half of a cell.
            start, stop = [(0, 2), (0, 1), (1, 2)][int(rng.integers(3))]
            flashes.append(Flash(str(rng.choice(LETTERS)), start, stop, column * slot + x, row * slot + y))
    return Scene(int(rng.integers(2**62)), 2, tuple(things), tuple(flashes))


def cell_batches(split: str, cells: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of single temporal cells, three quarters of them crowded.

    Args:
        split: of the world.
        cells: a batch, a multiple of 8.

    Yields:
        Pixel rows [cells * 256, 1176] and labels [cells, N, len(HEADS)].
    """
    index = 0
    while True:
        rows, labels = [], []
        for _ in range(cells // 8):
            rng = clip_rng(split, index)
            scene = make_pseudo_scene(rng) if index % 8 == 7 else make_scene(rng)
            rendering = render(scene)
            frames = through_codec(rendering.frames) if index % 4 == 0 else rendering.frames
            wanted = dense_labels(scene, rendering)
            interesting = (wanted > 0).any(-1).sum(-1) + 20.0 * (wanted[..., 4] > 0).any(-1) + 1.0
            chosen = rng.choice(len(wanted), size=2, p=interesting / interesting.sum())
            rows += [frames[2 * c : 2 * c + 2] for c in chosen]
            labels.append(wanted[chosen])
            for _ in range(6):
                crowd = crowded_scene(rng)
                rendering = render(crowd)
                rows.append(rendering.frames)
                labels.append(dense_labels(crowd, rendering))
            index += 1
        yield pixel_rows(np.concatenate(rows)), torch.from_numpy(np.concatenate(labels))


def train_vision(
    model: Any, steps: int, *, learning_rate: float = 2e-3, cells: int = 32, seed: int = 0
) -> dict[str, float]:
    """Train ``model.model.visual`` on dense labels, in place.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration with patch size 14, merge 2, two frames a cell.
        steps: of AdamW, cosine schedule.
        learning_rate: at its highest.
        cells: temporal cells in a batch, a multiple of 8.
        seed: of the heads.

    Returns:
        Accuracy of each head on labelled non-ground tokens, running mean over the last batches.
    """
    torch.manual_seed(seed)
    tower = model.model.visual
    batch_equal_windows(tower)
    width = model.config.get_text_config().hidden_size
    head = torch.nn.Linear(width, sum(count + 1 for count in HEADS.values()))
    parameters = [*tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    batches = cell_batches("vision", cells)
    thw = torch.tensor([[1, 2 * GRID, 2 * GRID]]).repeat(cells, 1)
    weights = [torch.tensor([0.1] + [1.0] * count) for count in HEADS.values()]
    accuracy = dict.fromkeys(HEADS, 0.0)
    started = time.monotonic()
    bar = tqdm(range(steps), desc="vision tower", unit="step", mininterval=5)
    for step in bar:
        rows, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tower(rows, grid_thw=thw).pooler_output
        logits = head(tokens.float()).split([count + 1 for count in HEADS.values()], dim=-1)
        flat = labels.view(-1, len(HEADS))
        loss = torch.zeros(())
        for i, name in enumerate(HEADS):
            loss = loss + torch.nn.functional.cross_entropy(
                logits[i], flat[:, i], weight=weights[i], ignore_index=IGNORE
            )
            there = flat[:, i] > 0
            if there.any():
                right = float((logits[i].argmax(-1) == flat[:, i])[there].float().mean())
                accuracy[name] = right if step == 0 else 0.97 * accuracy[name] + 0.03 * right
        # Embeddings of the size that the language model's own words have.
        loss = loss + 0.01 * (tokens.float().pow(2).mean() - 1).pow(2)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix({"loss": f"{float(loss.detach()):.2f}", **{k[:3]: f"{v:.2f}" for k, v in accuracy.items()}})
    return {**accuracy, "seconds": time.monotonic() - started}
