"""The prompt of the transformers engine: token ids, and where the visual slots are.

No vision tower runs: its time is the same in every row and in neither column, and the language model's time does not
depend on the values of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.prefill.preset import Prepared
from score_vllm.layout import VideoLayout

# Ordinary text in every tokenizer here: the demo's has 256 bytes, the true ones put their first words there.
TEXT_IDS = 256


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt with uncompressed videos.

    Attributes:
        input_ids: [L] int64.
        token_types: [L] int64: 0 text, 2 video, as transformers' ``mm_token_type_ids``.
        layouts: of its videos.
        starts: places where their spans begin.
        slots: per video [T * N] int64, the places of its tokens in the prompt, ascending.
    """

    input_ids: torch.Tensor
    token_types: torch.Tensor
    layouts: tuple[VideoLayout, ...]
    starts: tuple[int, ...]
    slots: tuple[torch.Tensor, ...]

    @property
    def text_slots(self) -> torch.Tensor:
        """[L - visual] int64, ascending."""
        return (self.token_types == 0).nonzero()[:, 0]


def build_prompt(prepared: Prepared, seed: int = 0) -> Prompt:
    """Random text around the preset's videos, in the family's format."""
    preset, config = prepared.preset, prepared.config
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []

    def text(count: int) -> None:
        ids.extend(torch.randint(TEXT_IDS, (count,), generator=generator).tolist())
        types.extend([0] * count)

    def marker(name: str) -> None:
        ids.append(config[f"vision_{name}_token_id"])
        types.append(0)

    layouts = preset.layouts(config)
    # Qwen2.5-VL's markers stand outside the span and count as text.
    marked = prepared.family == "qwen2_5_vl"
    free = preset.text_tokens - 2 * len(layouts) * marked
    if free < 2:
        raise ValueError(f"text_tokens {preset.text_tokens} leaves no text around {len(preset.videos)} videos")
    text(free // 2)
    video_token = config.get("video_token_id", config.get("video_token_index"))
    starts, slots = [], []
    for layout in layouts:
        if marked:
            marker("start")
        starts.append(len(ids))
        vision = torch.from_numpy(layout.vision()[:, 0])
        span = torch.full((layout.structure_tokens + len(vision),), video_token)
        kinds = torch.full_like(span, 2)
        structure = torch.from_numpy(layout.slots)
        # Learned rows count as text here.
        span[structure], kinds[structure] = torch.from_numpy(layout.ids).clamp(min=0), 0
        slots.append(len(ids) + vision)
        ids += span.tolist()
        types += kinds.tolist()
        if marked:
            marker("end")
    text(free - free // 2)
    return Prompt(torch.tensor(ids), torch.tensor(types), tuple(layouts), tuple(starts), tuple(slots))
