"""What a video costs vLLM's scheduler: the tokens that the vision tower encodes, not the ones that are kept."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from score_vllm.config import ServingConfig
from score_vllm.models.processing import CELLS_KEY, LAYOUT_KEY
from score_vllm.vision.cell_cache import count_distinct


class EncodedTokensCacheManager(EncoderCacheManager):
    """vLLM's encoder cache, with the compute budget of a step charged by encoded tokens.

    vLLM charges the tokens that a video has in the prompt. Compressed to a tenth, ten times as many videos would be
    encoded in one step, and every stream on the server would stand still meanwhile. Charged by what is encoded, a step
    encodes no more than it would without compression. Space in the cache is still charged by kept tokens, which is
    what it holds.

    No admitted video is larger than a step's budget (:mod:`score_vllm.models.admission`): each gets its turn.
    Cells that a video has several times count once; that a cell is in the worker's cache is not known here, and such a
    cell counts as if it were encoded.
    A video that comes from a remote encoder cache is charged as if it were encoded here: too strict, for that one step.

    Chosen by ``--ec-manager-config``; score-serve does so by itself.

    Args:
        cache_size: rows of the cache.
        reuses_cells: whether the workers encode a cell once that a video has several times.
    """

    def __init__(self, cache_size: int, reuses_cells: bool = False) -> None:
        super().__init__(cache_size)
        self._reuses_cells = reuses_cells
        # What encoding costs beyond the kept tokens, which vLLM charges itself: of videos scheduled in this step, and
        # of videos of the current request, which may yet be turned down.
        self._scheduled: dict[tuple[str, int], int] = {}
        self._in_hand: dict[tuple[str, int], int] = {}

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: Any) -> EncodedTokensCacheManager:
        """vLLM's entry point."""
        serving = ServingConfig.from_hf_config(vllm_config.model_config.hf_config)
        return cls(cache_size, serving is not None and serving.reuses_cells)

    def _surcharge(self, request: Request, input_id: int) -> int:
        """Encoded minus kept tokens; 0 for images and precomputed embeddings. Where the scheduler does not see the
        sizes (vLLM's shared-memory cache), a video counts as the largest one: a step of its own."""
        feature = request.mm_features[input_id]
        if feature.data is None:
            return self.cache_size if feature.modality == "video" else 0
        if LAYOUT_KEY not in feature.data or "pixel_values_videos" not in feature.data:
            return 0
        cells, rows, columns = feature.data[LAYOUT_KEY].data[:3].tolist()
        if self._reuses_cells:
            cells = count_distinct(feature.data[CELLS_KEY].data)
        encoded = cells * rows * columns
        return max(0, encoded - request.get_num_encoder_embeds(input_id))

    def can_allocate(
        self, request: Request, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        """As vLLM's, with the surcharges of this step and of this video off the budget."""
        if num_embeds_to_schedule == 0:
            self._in_hand.clear()
        surcharge = self._surcharge(request, input_id)
        if self._scheduled or self._in_hand:
            spent = sum(self._scheduled.values()) + sum(self._in_hand.values())
            cost = request.get_num_encoder_embeds(input_id) + surcharge
            if cost > encoder_compute_budget - spent:
                return False
        if not super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule):
            return False
        self._in_hand[request.request_id, input_id] = surcharge
        return True

    def allocate(self, request: Request, input_id: int) -> None:
        """As vLLM's; from here on the video counts until the end of the step."""
        super().allocate(request, input_id)
        key = request.request_id, input_id
        self._scheduled[key] = self._in_hand.pop(key, 0)

    def get_freed_mm_hashes(self) -> list[str]:
        """As vLLM's. The scheduler calls it once, at the end of every step."""
        self._scheduled.clear()
        self._in_hand.clear()
        return super().get_freed_mm_hashes()

    def reset(self) -> None:
        """As vLLM's."""
        super().reset()
        self._scheduled.clear()
        self._in_hand.clear()
