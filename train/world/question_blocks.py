"""Several questions about one video in one forward pass: they share its tokens and do not see each other.

Each question stands where it would stand alone (same positions, attention to the video and to itself only), so its
logits are those of a request of its own; the video, which is nearly all of the cost, runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Block:
    """One question and its answer as token ids, both non-empty: what follows the video, and the response."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """A batch ready for the language model.

    Attributes:
        embeds: [B, S, D].
        positions: [3, B, S] int64, M-RoPE.
        mask: [1, 1, S, S] bool, True where attention is allowed.
        rows: [L] int64, rows of the flattened [B * S] states that predict a target token.
        targets: [L] int64, the tokens they should predict.
        owners: [L] int64, number of the block (counted over the whole batch) that each target belongs to.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def pack_blocks(
    embed: Any,
    prefix: Sequence[int],
    suffix: Sequence[int],
    x: torch.Tensor,
    offsets: torch.Tensor,
    extent: int,
    blocks: Sequence[Sequence[Block]],
) -> PackedBatch:
    """Lay out ``prefix, video, suffix, block, block, ...`` for every video of a batch.

    Args:
        embed: module from token ids to embeddings.
        prefix, suffix: token ids before and directly after the video, common to all.
        x: [B, K, D] kept visual tokens.
        offsets: [B, K, 3] int64, their original positions relative to the video's base.
        extent: positions that the whole video takes (:class:`score_vllm.layout.VideoLayout`).
        blocks: B lists of equal length.

    Returns:
        The packed batch; blocks are padded to the longest of their column.

    Raises:
        ValueError: the numbers of videos, rows or blocks differ.
    """
    batch, kept, _ = x.shape
    if offsets.shape != (batch, kept, 3) or len(blocks) != batch or len({len(row) for row in blocks}) != 1:
        raise ValueError(
            f"x {tuple(x.shape)}, offsets {tuple(offsets.shape)} and {len(blocks)} lists of blocks do not fit"
        )
    device = x.device
    columns = len(blocks[0])
    widths = [max(len(row[j].prompt) + len(row[j].target) - 1 for row in blocks) for j in range(columns)]
    shared = len(prefix) + kept + len(suffix)
    total = shared + sum(widths)
    ids = torch.zeros(batch, total - shared, dtype=torch.int64)
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    starts = [sum(widths[:j]) for j in range(columns)]
    for b, row in enumerate(blocks):
        for j, block in enumerate(row):
            text = block.prompt + block.target[:-1]
            ids[b, starts[j] : starts[j] + len(text)] = torch.tensor(text)
            first = b * total + shared + starts[j] + len(block.prompt) - 1
            rows += range(first, first + len(block.target))
            targets += block.target
            owners += [b * columns + j] * len(block.target)
    base = len(prefix)
    after = base + extent
    text_positions = torch.cat(
        [torch.arange(after, after + len(suffix)), *(torch.arange(width) + after + len(suffix) for width in widths)]
    )
    positions = torch.empty(3, batch, total, dtype=torch.int64)
    positions[:, :, :base] = torch.arange(base)
    positions[:, :, base : base + kept] = (offsets.cpu() + base).permute(2, 0, 1)
    positions[:, :, base + kept :] = text_positions
    segment = torch.cat([torch.zeros(shared), *(torch.full((width,), j + 1.0) for j, width in enumerate(widths))])
    mask = torch.ones(total, total, dtype=torch.bool).tril() & ((segment[:, None] == segment) | (segment == 0))

    def word(tokens: Sequence[int]) -> torch.Tensor:
        return embed(torch.tensor(tokens, device=device))[None].expand(batch, -1, -1).to(x.dtype)

    embeds = torch.cat([word(prefix), x, word(suffix), embed(ids.to(device)).to(x.dtype)], dim=1)
    return PackedBatch(
        embeds,
        positions.to(device),
        mask[None, None].to(device),
        torch.tensor(rows, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(owners, device=device),
    )


def block_logits(model: Any, packed: PackedBatch) -> torch.Tensor:
    """Logits of every target token of a packed batch.

    Args:
        model: transformers' Qwen2_5_VLForConditionalGeneration, attention implementation "sdpa".
        packed: of :func:`pack_blocks`.

    Returns:
        [L, V], in the model's dtype.
    """
    hidden = model.model.language_model(
        inputs_embeds=packed.embeds,
        position_ids=packed.positions,
        attention_mask={"full_attention": packed.mask},
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[packed.rows])


def blocks_right(logits: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """[number of blocks] bool: whether greedy decoding would give exactly the target; teacher forcing is exact then."""
    right = logits.argmax(-1) == packed.targets
    count = int(packed.owners.max()) + 1
    wrong = torch.zeros(count, device=logits.device).index_add_(0, packed.owners, (~right).float())
    return wrong == 0
