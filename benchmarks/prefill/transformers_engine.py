"""The paper's protocol: transformers' own language model, one prompt at a time, compressor in front.

What is timed: ``compressor`` is selection of the kept rows; ``llm_forward`` is the language model and the head's
last row, filling a cache; ``total`` is one stretch from the visual rows to the logits, so that putting the shorter
prompt together counts too. Visual rows exist beforehand, and so does the saliency of methods that rank by the tower's
attention: their rows do not pay for reading it out, as those of the vLLM engine do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Stopwatch
from benchmarks.prefill.preset import SECONDS_PER_CELL, Prepared
from benchmarks.prefill.prompt import Prompt, build_prompt
from benchmarks.prefill.rows import CheckError, Times
from benchmarks.tokens import scene_tokens
from score_vllm.kernels import ops
from score_vllm.kernels.inputs import PositionTable
from score_vllm.policy import RetentionPolicy
from score_vllm.positions import unpack_offsets
from score_vllm.select import select_retained

# Methods whose kept rows absorb others; the rest hand over the rows that they keep.
MERGING = ("fastvid", "flashvid", "holitom", "tango")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the language model gets.

    Attributes:
        embeds: [L, D].
        positions: [3, L] int64.
        extras: keyword arguments of the family (Qwen3-VL's deepstack rows and their mask).
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    extras: dict[str, Any]


def load_language_model(prepared: Prepared, device: str, attention: str) -> tuple[Any, Any, Any]:
    """``(language model, head, shell)``; the shell is the whole model, perhaps on the meta device, for its positions.

    Random weights are drawn on the device by the model's own initialisation; the vision tower is never allocated.
    """
    import transformers

    dtype = getattr(torch, prepared.preset.dtype)
    if prepared.has_weights:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            prepared.path, dtype=dtype, attn_implementation=attention
        )
        for tower in {"visual", "vision_tower", "multi_modal_projector"} & {n for n, _ in model.model.named_children()}:
            setattr(model.model, tower, None)
        model = model.to(device).eval()
        return model.model.language_model, model.lm_head, model.model
    config = transformers.AutoConfig.from_pretrained(prepared.path)
    config._attn_implementation = attention
    with torch.device("meta"):
        shell = transformers.AutoModelForImageTextToText.from_config(config).model
    text_config = config.get_text_config()
    text_config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(device):
        text = type(shell.language_model)._from_config(text_config, dtype=dtype)
        head = torch.nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False, dtype=dtype)
    return text.eval(), head, shell


class TransformersEngine:
    """Language model, prompt and visual rows of a preset.

    Args:
        prepared: the preset.
        device: ``cpu`` or ``cuda``.
        attention: transformers' ``attn_implementation``.
    """

    def __init__(self, prepared: Prepared, device: str, attention: str = "sdpa") -> None:
        self.prepared, self.device = prepared, device
        dtype = getattr(torch, prepared.preset.dtype)
        self.text, self.head, shell = load_language_model(prepared, device, attention)
        self.prompt: Prompt = build_prompt(prepared)
        width = prepared.shape.hidden_size
        self.rows = [
            scene_tokens(layout.grid.t, layout.grid.tokens_per_frame, width, dtype, device, seed)
            for seed, layout in enumerate(self.prompt.layouts)
        ]
        self.saliency = [
            torch.rand(x.shape[:2], generator=torch.Generator(device).manual_seed(1), device=device) for x in self.rows
        ]
        # Rows of a span with structure between them: placed by table, as the others are by the kernel.
        self.offsets = [layout.vision_offsets().to(device) for layout in self.prompt.layouts]
        self.one_axis = prepared.family == "llava_onevision"
        self.deepstack = len(prepared.config["vision_config"].get("deepstack_visual_indexes", ()))
        policy = RetentionPolicy.from_pretrained(str(prepared.policy)).to(device)
        parameters = (policy.w_in, policy.b_in, policy.w_out, policy.b_out)
        self.policy = policy
        self.weights = ops.pack_weights(*parameters, dtype, policy.config.use_residual)
        self.text_slots = self.prompt.text_slots.to(device)
        self.slots = [slots.to(device) for slots in self.prompt.slots]
        self._build_whole(shell)

    @torch.no_grad()
    def _build_whole(self, shell: Any) -> None:
        """The uncompressed inputs, at the positions that transformers itself gives them."""
        prompt = self.prompt
        if self.one_axis:
            positions = torch.arange(len(prompt.input_ids)).expand(3, 1, -1)
        else:
            merge = int(self.prepared.config["vision_config"]["spatial_merge_size"])
            grids = [layout.grid for layout in prompt.layouts]
            positions, _ = shell.get_rope_index(
                prompt.input_ids[None],
                mm_token_type_ids=prompt.token_types[None],
                video_grid_thw=torch.tensor([[g.t, g.h * merge, g.w * merge] for g in grids]),
                second_per_grid_ts=torch.full((len(grids),), SECONDS_PER_CELL),
            )
        positions = positions[:, 0].to(self.device)
        embeds = self.text.embed_tokens(prompt.input_ids.to(self.device))
        for slots, x in zip(self.slots, self.rows, strict=True):
            embeds[slots] = x.flatten(0, 1)
        self.text_embeds, self.text_positions = embeds[self.text_slots], positions[:, self.text_slots]
        self.bases = [positions[0, start] for start in prompt.starts]
        visual = torch.cat(self.slots)
        self.deep_rows = torch.cat([x.flatten(0, 1) for x in self.rows]) if self.deepstack else None
        extras = self._extras(visual, torch.arange(len(visual), device=self.device), len(embeds))
        self.whole = Inputs(embeds, positions, extras)

    def _extras(self, slots: torch.Tensor, indices: torch.Tensor, length: int) -> dict[str, Any]:
        """Qwen3-VL adds rows of the tower's middle layers to the kept visual tokens in the first decoder layers."""
        if self.deep_rows is None:
            return {}
        mask = torch.zeros(1, length, dtype=torch.bool, device=self.device)
        mask[0, slots] = True
        # The same rows for every layer: other values would cost the same.
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": [self.deep_rows[indices]] * self.deepstack}

    def select(self, number: int, ratio: float, method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(indices [K], rows [K, D], positions [3, K])`` of one video, as the server selects and places them."""
        layout, x = self.prompt.layouts[number], self.rows[number]
        keep = self.prepared.preset.retained_of(layout.grid, ratio)
        width = x.shape[-1]
        offsets = None
        if method == "score":
            table = None if layout.structure_tokens else PositionTable.from_layout(layout)
            out = ops.select_rows(x, self.weights, keep, table, always=self.policy.spread(layout.grid, keep))
            indices, rows = out.indices, out.buffer[:, :width]
            if table is not None:
                offsets = unpack_offsets(out.buffer[:, width:])
        else:
            kept, _ = select_retained(x, keep, method, saliency=self.saliency[number], grid=layout.grid)
            indices, rows = kept.indices, kept.embeddings
        if offsets is None:
            offsets = self.offsets[number][indices]
        return indices, rows, (self.bases[number] + offsets).T

    def assemble(self, selections: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Inputs:
        """The shorter prompt: all text, and the kept rows in their order. No host sync."""
        kept = torch.cat([slots[s[0]] for slots, s in zip(self.slots, selections, strict=True)])
        order = torch.cat([self.text_slots, kept]).argsort()
        embeds = torch.cat([self.text_embeds, *[s[1] for s in selections]])[order]
        positions = torch.cat([self.text_positions, *[s[2] for s in selections]], dim=1)[:, order]
        if self.deep_rows is None:
            return Inputs(embeds, positions, {})
        starts = [sum(len(slots) for slots in self.slots[:n]) for n in range(len(selections))]
        indices = torch.cat([s[0] + start for s, start in zip(selections, starts, strict=True)])
        # Places of the kept rows in the shorter prompt.
        places = order.argsort()[len(self.text_slots) :]
        return Inputs(embeds, positions, self._extras(places, indices, len(embeds)))

    def forward(self, inputs: Inputs) -> torch.Tensor:
        """[V] logits of the first token."""
        positions, extras = inputs.positions[:, None], inputs.extras
        if self.one_axis:
            # The mask matters: without one transformers takes gaps in 1-D positions for packed sequences.
            positions = inputs.positions[:1]
            extras = {"attention_mask": torch.ones_like(positions)}
        out = self.text(inputs_embeds=inputs.embeds[None], position_ids=positions, use_cache=True, **extras)
        logits: torch.Tensor = self.head(out.last_hidden_state[0, -1])
        return logits

    def compress(self, ratio: float, method: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """:meth:`select` for every video."""
        return [self.select(number, ratio, method) for number in range(len(self.rows))]

    @torch.no_grad()
    def run(self, ratio: float | None, method: str | None) -> Times:
        """Milliseconds of one prefill; None is vanilla."""
        compressor, forward = Stopwatch(), Stopwatch()
        with Stopwatch() as total:
            inputs = self.whole
            if ratio is not None and method is not None:
                with compressor:
                    selections = self.compress(ratio, method)
                inputs = self.assemble(selections)
            with forward:
                self.forward(inputs)
        return {"compressor": compressor.ms, "llm_forward": forward.ms, "total": total.ms}

    @torch.no_grad()
    def check(self, ratios: list[float], names: list[str]) -> None:
        """Every method: exact counts, rows and positions equal to a gather of the whole inputs, vanilla at ratio 1.

        Merging methods write rows of their own at ratios below 1; their positions are checked all the same.

        Raises:
            CheckError: says what differs.
        """
        reference = self.forward(self.whole)
        if not bool(reference.isfinite().all()):
            raise CheckError("the vanilla logits are not finite")
        for name in names:
            for ratio in [1.0, *ratios]:
                self._check_one(ratio, name)
        whole = self.forward(self.assemble(self.compress(1.0, names[0])))
        if not torch.equal(whole, reference):
            raise CheckError(f"{names[0]} at ratio 1 gives other logits than vanilla")

    def _check_one(self, ratio: float, name: str) -> None:
        selections = self.compress(ratio, name)
        inputs, want = self.assemble(selections), [self.text_slots]
        for layout, slots, (indices, _, _) in zip(self.prompt.layouts, self.slots, selections, strict=True):
            keep = self.prepared.preset.retained_of(layout.grid, ratio)
            if indices.shape != (keep,) or not bool((indices[1:] > indices[:-1]).all()):
                raise CheckError(f"{name} at {ratio} kept {len(indices)} tokens instead of {keep}, or not in order")
            want.append(slots[indices])
        gathered = torch.cat(want).sort().values
        if not torch.equal(inputs.positions, self.whole.positions[:, gathered]):
            raise CheckError(f"{name} at {ratio}: kept rows do not stand at their original positions")
        merges = name in MERGING and ratio < 1
        text = torch.isin(gathered, self.text_slots) if merges else slice(None)
        if not torch.equal(inputs.embeds[text], self.whole.embeds[gathered][text]):
            raise CheckError(f"{name} at {ratio}: rows differ from a gather of the whole prompt")
        for key, value in inputs.extras.items():
            full = self.whole.extras[key]
            if key == "visual_pos_masks":
                same = torch.equal(value[0], full[0, gathered])
            else:
                places = torch.isin(torch.cat(self.slots), gathered)
                same = all(torch.equal(a, b[places]) for a, b in zip(value, full, strict=True))
            if not same:
                raise CheckError(f"{name} at {ratio}: {key} differs from a gather of the whole prompt")
