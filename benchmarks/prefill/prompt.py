"""The prompt of the transformers engine: token ids, and where the visual slots are.

No vision tower runs: its time is the same in every row and in neither column, and the language model's time does not
depend on the values of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.prefill.preset import TIMESTAMP_TOKENS, Prepared
from score_vllm.types import VideoGrid

# Ordinary text in every tokenizer here: the demo's has 256 bytes, the true ones put their first words there.
TEXT_IDS = 256


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt with uncompressed videos.

    Attributes:
        input_ids: [L] int64.
        token_types: [L] int64: 0 text, 2 video, as transformers' ``mm_token_type_ids``.
        grids: token grids of its videos.
        slots: per video [T * N] int64, the places of its tokens in the prompt, ascending.
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    grids: tuple[VideoGrid, ...]
    slots: tuple[torch.Tensor, ...]

    @property
    def text_slots(self) -> torch.Tensor:
        """[L - visual] int64, ascending."""
        return (self.token_types == 0).nonzero()[:, 0]


def build_prompt(prepared: Prepared, seed: int = 0) -> Prompt:
    """Random text around the preset's videos, in the family's format.

    Qwen2.5-VL: one span per video. Qwen3-VL: per temporal cell a timestamp and a span of its own.
    """
    preset, config = prepared.preset, prepared.config
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []

    def text(count: int) -> None:
        ids.extend(torch.randint(TEXT_IDS, (count,), generator=generator).tolist())
        types.extend([0] * count)

    def span(tokens: int) -> torch.Tensor:
        marked = [config["vision_start_token_id"], *[config["video_token_id"]] * tokens, config["vision_end_token_id"]]
        slots = torch.arange(len(ids) + 1, len(ids) + 1 + tokens)
        ids.extend(marked)
        types.extend([0, *[2] * tokens, 0])
        return slots

    by_cell = prepared.family == "qwen3_vl"
    # A span brings its own two markers; those around cells are counted by structure_tokens.
    free = preset.text_tokens - (0 if by_cell else 2 * len(preset.videos))
    if free < 2:
        raise ValueError(f"text_tokens {preset.text_tokens} leaves no text around {len(preset.videos)} videos")
    text(free // 2)
    slots = []
    for grid in preset.videos:
        if by_cell:
            cells = []
            for _ in range(grid.t):
                text(TIMESTAMP_TOKENS)
                cells.append(span(grid.tokens_per_frame))
            slots.append(torch.cat(cells))
        else:
            slots.append(span(grid.num_tokens))
    text(free - free // 2)
    return Prompt(torch.tensor(ids), torch.tensor(types), preset.videos, tuple(slots))
