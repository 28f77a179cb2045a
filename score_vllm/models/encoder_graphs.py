"""vLLM's CUDA graphs of the Qwen towers, for the cells of compressed videos that must be encoded.

vLLM's manager packs the items of a batch into captured sizes, replays, and hands the tower's rows to
``postprocess_encoder_output``. Here an item stays one video, of which only the missing cells are packed, and selection
follows the replay. A video with more missing cells than a graph has room for runs eagerly: there the work takes the
time, not the launching of kernels. Where a hook must see the tower at work (saliency), or ranks encode different items,
videos stay out of the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from vllm.v1.worker.encoder_cudagraph_defs import EncoderItemSpec

from score_vllm.models.cells import ROWS
from score_vllm.models.processing import CELLS_KEY, FIELDS, TICKET_KEY
from score_vllm.vision.cell_cache import CellPlan, device_index

# In a batch from its first look on: its :class:`_Batch`.
_BATCH_KEY = "score_batch"
# More tokens than any graph has: vLLM's manager runs such an item eagerly and alone.
_TOO_MANY = 2**31


@dataclass(frozen=True, slots=True)
class _Batch:
    """The videos of a batch, as lists with an entry per video.

    Attributes:
        fields: what the processor wrote, by key.
        plans: None of embeddings, which nothing encodes.
        specs: what the missing cells cost.
        inputs: pixels of the missing cells [n, ...], or embeddings [T * N, W].
        grids: of the missing cells, in patches.
    """

    fields: dict[str, list[Any]]
    plans: list[CellPlan | None]
    specs: list[EncoderItemSpec]
    inputs: list[torch.Tensor]
    grids: list[list[int]]

    def pick(self, indices: list[int]) -> _Batch:
        """Some of the videos."""
        fields = {key: [values[i] for i in indices] for key, values in self.fields.items()}
        lists: Any = (self.plans, self.specs, self.inputs, self.grids)
        return _Batch(fields, *[[values[i] for i in indices] for values in lists])


class EncoderGraphsMixin:
    """Between the compression mixin and a model class that has encoder graphs."""

    compressor: Any
    visual: Any
    use_data_parallel: bool
    # Cells of one video for which every graph has room; 0 before anything is captured.
    _graph_cells = 0

    @property
    def graphs_take_videos(self) -> bool:
        """Whether compressed videos may pass through graphs."""
        return self.compressor is not None and not self.use_data_parallel and not self.compressor.needs_saliency

    def get_encoder_cudagraph_config(self) -> Any:
        """vLLM's; without videos where they must stay out."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        if self.compressor is not None and not self.graphs_take_videos:
            config.modalities = [name for name in config.modalities if name != "video"]
        return config

    def prepare_encoder_cudagraph_capture_inputs(
        self, token_budget: int, max_batch_size: int, max_frames_per_batch: int, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's. A graph has room for so many sequences of attention, here cells, over all items of a full batch."""
        self._graph_cells = max_frames_per_batch // max_batch_size
        return super().prepare_encoder_cudagraph_capture_inputs(  # type: ignore[misc]
            token_budget, max_batch_size, max_frames_per_batch, *args, **kwargs
        )

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        """Of a video, what its missing cells cost."""
        if "video_grid_thw" not in mm_kwargs or not self.graphs_take_videos:
            return super().get_encoder_cudagraph_item_specs(mm_kwargs)  # type: ignore[misc]
        if _BATCH_KEY not in mm_kwargs:
            mm_kwargs[_BATCH_KEY] = self._plan_batch(mm_kwargs)
        return mm_kwargs[_BATCH_KEY].specs

    def _plan_batch(self, mm_kwargs: dict[str, Any]) -> _Batch:
        unit = self.visual.spatial_merge_size**2
        batch = _Batch({key: list(mm_kwargs[key]) for key in FIELDS}, [], [], [], [])
        is_pixels = "pixel_values_videos" in mm_kwargs
        values = mm_kwargs["pixel_values_videos" if is_pixels else "video_embeds"]
        grids = [[int(value) for value in thw] for thw in mm_kwargs["video_grid_thw"]]
        stops = list(accumulate(t * h * w // (1 if is_pixels else unit) for t, h, w in grids))
        for (t, h, w), keys, start, stop in zip(grids, mm_kwargs[CELLS_KEY], [0, *stops], stops, strict=False):
            inputs, plan, missing = values[start:stop], None, 0
            if is_pixels:
                plan = self.compressor.cells.plan(keys, (ROWS,))
                missing = len(plan.missing)
                if missing < t:
                    chosen = device_index(plan.missing, inputs.device)
                    inputs = inputs.view(t, h * w, -1).index_select(0, chosen).flatten(0, 1)
            tokens = missing * h * w // unit if missing <= self._graph_cells else _TOO_MANY
            batch.plans.append(plan)
            batch.specs.append(EncoderItemSpec(input_size=missing * h * w, output_tokens=tokens))
            batch.inputs.append(inputs)
            batch.grids.append([missing, h, w])
        return batch

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        """Of videos, their missing cells alone."""
        if _BATCH_KEY not in mm_kwargs:
            return super().select_encoder_cudagraph_items(mm_kwargs, indices)  # type: ignore[misc]
        batch = mm_kwargs[_BATCH_KEY].pick(indices)
        pixels = [inputs for inputs, grid in zip(batch.inputs, batch.grids, strict=True) if grid[0]]
        return {
            "pixel_values_videos": torch.cat(pixels) if pixels else None,
            "video_grid_thw": [grid for grid in batch.grids if grid[0]],
            _BATCH_KEY: batch,
        }

    def postprocess_encoder_output(
        self,
        outputs: dict[str, torch.Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: dict[int, torch.Tensor] | list[torch.Tensor | None],
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Keep the cells just encoded, and select; a graph's output is overwritten by its next replay, rows are not."""
        batch: _Batch | None = (batch_mm_kwargs or {}).get(_BATCH_KEY)
        if batch is None:
            super().postprocess_encoder_output(  # type: ignore[misc]
                outputs, indices, per_item_out_tokens, dest, clone, batch_mm_kwargs
            )
            return
        start = 0
        for place, index in enumerate(indices):
            x, plan = batch.inputs[place], batch.plans[place]
            if plan is None:
                x = x.to(self.visual.dtype)
            else:
                stop = start + batch.specs[place].input_size // self.visual.spatial_merge_size**2
                rows = outputs["default"][start:stop] if stop > start else None
                fresh = {} if rows is None else {ROWS: rows.view(len(plan.missing), -1, rows.shape[-1])}
                ticket = int(batch.fields[TICKET_KEY][place])
                x, start = self.compressor.cells.finish(plan, ticket, fresh)[ROWS].flatten(0, 1), stop
            fields = {key: values[place : place + 1] for key, values in batch.fields.items()}
            (dest[index],) = self.compress_videos(fields, [(x, None)])  # type: ignore[attr-defined]
