"""The oracle: transformers' own model on the kept rows, at the unpruned positions gathered at the kept slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLForConditionalGeneration


@dataclass
class VisualItem:
    """One image or video as the oracle sees it.

    Attributes:
        features: [T * N, D] output of the vision tower, before selection.
        grid: token grid (t, h, w).
        t_factor: positions per temporal cell; images have one cell.
        kept: [K] flat indices that stay.
        rows: [K, D] what stands at those places, where a method merges; None: the features themselves.
    """

    features: torch.Tensor
    grid: tuple[int, int, int]
    t_factor: float
    kept: torch.Tensor
    rows: torch.Tensor | None = None


def unpruned_positions(prompt: list[int | VisualItem]) -> tuple[list[torch.Tensor], int]:
    """Position ids [3, n] of every part of an unpruned prompt, one loop step per token, and the next position.

    Written from the model's report, on purpose without arithmetic shared with the package: a text token advances
    all three axes by one; a vision token stands at base + (floor(t * factor), h, w); what follows a vision item
    starts one after the largest position so far.
    """
    parts, highest = [], -1
    for part in prompt:
        base = highest + 1
        if isinstance(part, VisualItem):
            t_size, h_size, w_size = part.grid
            ids = [
                (base + int(t * part.t_factor), base + h, base + w)
                for t in range(t_size)
                for h in range(h_size)
                for w in range(w_size)
            ]
        else:
            ids = [(base, base, base)]
        highest = max(highest, max(max(triple) for triple in ids))
        parts.append(torch.tensor(ids, dtype=torch.int64).T)
    return parts, highest + 1


@torch.no_grad()
def greedy(
    model: Qwen2_5_VLForConditionalGeneration, prompt: list[int | VisualItem], num_tokens: int
) -> tuple[torch.Tensor, list[int]]:
    """First-token log-probabilities [vocab] and greedy tokens, without a cache.

    Args:
        model: in fp32.
        prompt: text token ids and visual items, in order.
        num_tokens: how many tokens to generate.
    """
    parts, next_position = unpruned_positions(prompt)
    embed = model.get_input_embeddings()
    rows, positions = [], []
    for part, ids in zip(prompt, parts, strict=True):
        if isinstance(part, VisualItem):
            rows.append((part.features[part.kept] if part.rows is None else part.rows).float())
            positions.append(ids[:, part.kept])
        else:
            rows.append(embed(torch.tensor([part])))
            positions.append(ids)
    inputs, places = torch.cat(rows), torch.cat(positions, dim=1)
    first, generated = None, []
    for _ in range(num_tokens):
        out = model.model.language_model(
            inputs_embeds=inputs[None], position_ids=places[:, None], use_cache=False, return_dict=True
        )
        logprobs = model.lm_head(out.last_hidden_state[0, -1]).log_softmax(-1)
        first = logprobs if first is None else first
        token = int(logprobs.argmax())
        generated.append(token)
        inputs = torch.cat([inputs, embed(torch.tensor([token]))])
        places = torch.cat([places, torch.full((3, 1), next_position)], dim=1)
        next_position += 1
    assert first is not None
    return first, generated
