"""Attention per token from plain queries and keys, one frame and head at a time."""

from __future__ import annotations

import pytest
import torch

from score_vllm.vision import saliency

FRAMES, PLACES, UNIT, HEADS, WIDTH = 3, 5, 4, 2, 8


@pytest.mark.parametrize("logits", [2**24, 100, 1])
def test_patch_saliency_in_chunks_of_any_size(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every patch's query against all keys of its frame; means over queries and over a token's patches."""
    monkeypatch.setattr(saliency, "_PATCH_LOGITS", logits)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(FRAMES * PLACES * UNIT, HEADS, WIDTH, generator=generator) for _ in range(2))
    expected = torch.zeros(FRAMES, PLACES)
    for t in range(FRAMES):
        rows = slice(t * PLACES * UNIT, (t + 1) * PLACES * UNIT)
        for head in range(HEADS):
            attention = (query[rows, head] @ key[rows, head].T / WIDTH**0.5).softmax(-1)
            expected[t] += attention.mean(0).reshape(PLACES, UNIT).mean(1)
    torch.testing.assert_close(saliency.patch_saliency(query, key, FRAMES, UNIT), expected)
