"""Packed questions must give what each would give alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from score_vllm import VideoGrid, demo
from score_vllm.layout import grid_layout
from score_vllm.train.world.equal_windows import batch_equal_windows
from score_vllm.train.world.question_blocks import Block, block_logits, blocks_right, pack_blocks

GRID = VideoGrid(3, 2, 4)
PREFIX, SUFFIX = (5, 6, 7), (8,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = tmp_path_factory.mktemp("packed") / "model"
    demo.build_model(path, dtype="float32")
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def alone(model: Any, x: torch.Tensor, offsets: torch.Tensor, block: Block) -> torch.Tensor:
    """Logits of one block's targets, by a plain causal run of its own."""
    embed = model.model.language_model.embed_tokens
    text = torch.tensor(SUFFIX + block.prompt + block.target[:-1])
    embeds = torch.cat([embed(torch.tensor(PREFIX)), x, embed(text)])[None]
    base = len(PREFIX)
    after = base + grid_layout(GRID, 2.0).extent
    positions = torch.cat(
        [torch.arange(base).expand(3, -1), (offsets + base).T, (torch.arange(len(text)) + after).expand(3, -1)], 1
    )
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False)
    return model.lm_head(hidden.last_hidden_state[0, -len(block.target) :])


@torch.no_grad()
def test_packed_equals_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 128, generator=generator)
    kept = torch.stack([torch.randperm(24, generator=generator)[:9].sort().values for _ in range(2)])
    offsets = grid_layout(GRID, 2.0).vision_offsets()[kept]
    blocks = [
        [Block((40, 41, 42), (50, 51)), Block((43,), (52, 53, 54))],
        [Block((44, 45), (55,)), Block((46, 47, 48, 49), (56, 57))],
    ]
    packed = pack_blocks(
        model.model.language_model.embed_tokens, PREFIX, SUFFIX, x, offsets, grid_layout(GRID, 2.0).extent, blocks
    )
    logits = block_logits(model, packed)
    assert packed.owners.unique().tolist() == [0, 1, 2, 3]
    for number, (b, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        mine = packed.owners == number
        torch.testing.assert_close(logits[mine], alone(model, x[b], offsets[b], blocks[b][j]), atol=2e-5, rtol=1e-4)
        assert packed.targets[mine].tolist() == list(blocks[b][j].target)


def test_a_block_is_right_only_when_every_token_is() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    x = torch.zeros(1, 1, 4)
    embed = torch.nn.Embedding(4, 4)
    blocks = [[Block((1,), (0, 1)), Block((1,), (2, 0))]]
    packed = pack_blocks(embed, (1,), (2,), x, torch.zeros(1, 1, 3, dtype=torch.int64), 1, blocks)
    assert blocks_right(logits, packed).tolist() == [True, False]


def test_shapes_that_do_not_fit_are_refused() -> None:
    embed = torch.nn.Embedding(4, 4)
    with pytest.raises(ValueError, match="do not fit"):
        pack_blocks(
            embed, (1,), (2,), torch.zeros(1, 2, 4), torch.zeros(1, 3, 3, dtype=torch.int64), 1, [[Block((1,), (0,))]]
        )


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(224, 224), (140, 196)])
def test_batched_windows_give_what_single_windows_give(model: Any, height: int, width: int) -> None:
    tower = model.model.visual
    thw = torch.tensor([[2, height // 14, width // 14]])
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(int(thw.prod()), 1176)).astype(np.float32))
    before = tower(pixels, grid_thw=thw).pooler_output
    batch_equal_windows(tower)
    batch_equal_windows(tower)
    torch.testing.assert_close(tower(pixels, grid_thw=thw).pooler_output, before, atol=1e-5, rtol=1e-4)
