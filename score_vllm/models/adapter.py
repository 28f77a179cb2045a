"""What every model family shares: vLLM's model contract, bent to K tokens per video.

How a compressed video passes through vLLM:

1. the processor (:mod:`score_vllm.models.processing`) writes K placeholders, K = ``num_retained_tokens(T * N,
   ratio)``, before the vision tower runs;
2. ``embed_multimodal`` encodes one video at a time, selects K tokens, and appends to each row the offset of its
   position from the video's base as base-256 digits (exact in bf16);
3. ``get_mrope_input_positions`` gives exact positions to all text and images, and the base to every video slot;
4. ``embed_input_ids`` strips the digits and keeps the decoded offsets; ``forward`` adds them to the positions.

Step 4 depends on no state of the request, so prefix-cache hits, chunk boundaries inside a video, several videos
and images beside them need no repair, and vLLM's own pruning switch, with its hooks in the runners, stays off.
A step without visual rows does no position work. Deviates from the first design note, which went through
``recompute_mrope_positions``: that hook is called for every request on every decode step of the V1 runner, and
never by the CPU runner.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from score_vllm import methods
from score_vllm.config import SPECULATIVE_METHODS, ServingConfig
from score_vllm.kernels import ops
from score_vllm.kernels.inputs import PolicyWeights, PositionTable
from score_vllm.models.processing import grid_of, temporal_factor
from score_vllm.models.timing import STATS_VARIABLE, CompressorTimer
from score_vllm.policy import RetentionPolicy
from score_vllm.positions import (
    POSITION_CHANNELS,
    VisualSpan,
    pack_offsets,
    prompt_positions,
    temporal_offsets,
    unpack_offsets,
    video_offsets,
)
from score_vllm.select import select_retained
from score_vllm.types import VideoGrid

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class VideoCompressor:
    """Selects and packs the rows of one video, inside the worker. Not a module: it owns no checkpoint weights.

    Args:
        serving: the serving configuration.
        hidden_size: D of the language model.

    Raises:
        ValueError: unknown method, or a policy that does not fit the model; both numbers are in the message.
        FileNotFoundError: the policy directory is missing or incomplete.
    """

    def __init__(self, serving: ServingConfig, hidden_size: int) -> None:
        self.serving = serving
        self.hidden_size = hidden_size
        # One worker per tensor-parallel group keeps the time, or every video would count several times.
        self.timer = CompressorTimer(os.environ.get(STATS_VARIABLE) if get_tensor_model_parallel_rank() == 0 else None)
        for name in serving.methods:
            methods.get(name)
        self.policy: RetentionPolicy | None = None
        self._weights: PolicyWeights | None = None
        self.nan_videos = torch.zeros((), dtype=torch.int64, device="cpu")
        if serving.policy is not None:
            self.policy = load_policy(serving.policy, hidden_size)
            if serving.policy_digest and self.policy.digest() != serving.policy_digest:
                raise ValueError(
                    f"policy {serving.policy} changed on disk while the server was starting; start it again"
                )

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compile the kernels at start-up, so that no request waits for it."""
        if self.policy is not None and device.type == "cuda":
            ops.warm_up(self._policy_weights(dtype, device))

    def _policy_weights(self, dtype: torch.dtype, device: torch.device) -> PolicyWeights:
        """The policy in the dtype and on the device of the tokens, cast once."""
        if self._weights is None or (self._weights.w_in.dtype, self._weights.w_in.device) != (dtype, device):
            assert self.policy is not None, "checked by ServingConfig"
            policy = self.policy.to(device)
            parameters = (policy.w_in, policy.b_in, policy.w_out, policy.b_out)
            self._weights = ops.pack_weights(*parameters, dtype, policy.config.use_residual)
        return self._weights

    def _count_nan(self, has_nan: torch.Tensor) -> None:
        """NaN scores mean a broken tower or hostile embeddings. Ending the engine would end every request, so such a
        video keeps tokens by index and is counted; on a GPU the flag stays there, and no sync is paid for it."""
        self.nan_videos = self.nan_videos.to(has_nan.device) + has_nan
        if not has_nan.is_cuda and bool(has_nan):
            logger.error("a video's scores are NaN: its vision features are broken, and so is its answer")

    @property
    def needs_saliency(self) -> bool:
        """True where a served method ranks by attention."""
        return any(methods.get(name).needs_saliency for name in self.serving.methods)

    def compress(
        self,
        x: torch.Tensor,
        grid: VideoGrid,
        t_factor: float,
        num_retained: int,
        method: str,
        saliency: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep K tokens of a video and append their position channels.

        Args:
            x: [T * N, D] output of the vision tower's merger.
            grid: T, rows, columns.
            t_factor: positions per temporal cell.
            num_retained: K.
            method: one of the serving configuration's methods.
            saliency: [T, N] for the methods that need one.

        Returns:
            [K, D + 9] in the dtype of ``x``.
        """
        with self.timer.measure(x.device):
            video = x.view(grid.t, grid.tokens_per_frame, x.shape[-1])
            if method == "score":
                table = PositionTable(torch.from_numpy(temporal_offsets(grid.t, t_factor)), grid.h, grid.w)
                out = ops.select_rows(video, self._policy_weights(x.dtype, x.device), num_retained, table)
                self._count_nan(out.has_nan)
                return out.buffer
            kept, has_nan = select_retained(video, num_retained, method, saliency=saliency)
            self._count_nan(has_nan)
            offsets = video_offsets(grid, t_factor).to(x.device, non_blocking=True)[kept.indices]
            return torch.cat([kept.embeddings, pack_offsets(offsets, x.dtype)], dim=1)


def load_policy(directory: str, hidden_size: int) -> RetentionPolicy:
    """Load a policy and check that it reads the model's tokens.

    Raises:
        ValueError: its hidden size differs from the model's; both numbers are in the message.
        FileNotFoundError: see :meth:`RetentionPolicy.from_pretrained`.
    """
    policy = RetentionPolicy.from_pretrained(directory)
    if policy.config.hidden_size != hidden_size:
        raise ValueError(
            f"policy {directory} was made for hidden size {policy.config.hidden_size}, "
            f"but the model has hidden size {hidden_size}"
        )
    return policy


def check_engine_config(config: VllmConfig) -> None:
    """Refuse what would give wrong positions, before any weight is loaded.

    Raises:
        ValueError: one sentence that names the option.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"SCORE does not support --pipeline-parallel-size {parallel.pipeline_parallel_size}: "
            "later stages would not see the positions of kept tokens; use --tensor-parallel-size"
        )
    if parallel.enable_dbo or parallel.use_ubatching:
        raise ValueError(
            "SCORE does not support --enable-dbo or micro-batches: they would lose the positions of kept tokens"
        )
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise ValueError(
            "SCORE does not support --enable-tower-connector-lora: vLLM sizes the tower's adapters by kept tokens"
        )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in SPECULATIVE_METHODS:
        raise ValueError(
            f"SCORE supports speculative decoding with method 'ngram' or 'suffix' only, got {speculative.method!r}: "
            "a draft model would read uncompressed positions"
        )
    multimodal = config.model_config.get_multimodal_config()
    if multimodal.video_pruning_rate:
        raise ValueError(
            f"--video-pruning-rate {multimodal.video_pruning_rate} is vLLM's own pruning and cannot be combined "
            "with SCORE; use --retention instead"
        )


class CompressionModelMixin:
    """Put before a family's model class; inert where no serving configuration is present."""

    # Read by vLLM's V1 runner: videos of one batch are encoded one after the other, as memory profiling assumes.
    requires_sequential_video_encoding = True

    compressor: VideoCompressor | None = None
    _position_offsets: torch.Tensor

    def _setup_compression(self, vllm_config: VllmConfig) -> None:
        serving = ServingConfig.from_hf_config(vllm_config.model_config.hf_config)
        if serving is None:
            return
        check_engine_config(vllm_config)
        hidden_size = vllm_config.model_config.get_hidden_size()
        # Past the parameters on purpose: the checkpoint loader must not look for the policy's weights.
        object.__setattr__(self, "compressor", VideoCompressor(serving, hidden_size))
        assert self.compressor is not None
        device = vllm_config.device_config.device
        self.compressor.prepare(vllm_config.model_config.dtype, device)
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(scheduler.max_num_batched_tokens, captured)
        # [tokens of a step, 3]; all zero except in a step that has visual rows.
        offsets = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        # A buffer, so that vLLM's sleep mode keeps it; not persistent, so that no checkpoint has to hold it.
        self.register_buffer("_position_offsets", offsets, persistent=False)  # type: ignore[attr-defined]
        self._offset_rows = 0

    def prompt_spans(self, mm_features: Sequence[Any]) -> list[VisualSpan]:
        """Images and videos of a prompt in order, from vLLM's feature specs."""
        config: Any = self.config  # type: ignore[attr-defined]
        merge_size = config.vision_config.spatial_merge_size
        tokens_per_second = float(getattr(config.vision_config, "tokens_per_second", 1.0))
        spans = []
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            place, is_video = feature.mm_position, feature.modality == "video"
            grid = grid_of(feature.data[f"{feature.modality}_grid_thw"].data, merge_size)
            t_factor = temporal_factor(feature.data, tokens_per_second) if is_video else 1.0
            spans.append(VisualSpan(place.offset, place.length, grid, t_factor, offsets_travel=is_video))
        return spans

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """[3, len(input_tokens)] positions and the decode delta; see :func:`score_vllm.positions.prompt_positions`."""
        if self.compressor is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        positions, delta = prompt_positions(len(input_tokens), self.prompt_spans(mm_features))
        return torch.from_numpy(positions), delta

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Merge the rows of a step; the offsets that video rows carry are kept for :meth:`forward`."""
        if self.compressor is not None:
            if self._offset_rows:
                self._position_offsets[: self._offset_rows].zero_()
                self._offset_rows = 0
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                assert is_multimodal is not None
                width = self.compressor.hidden_size
                rows = len(is_multimodal)
                self._position_offsets[:rows][is_multimodal] = torch.cat(
                    [_row_offsets(item, width) for item in multimodal_embeddings]
                )
                self._offset_rows = rows
                multimodal_embeddings = [item[:, :width] for item in multimodal_embeddings]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's forward at the kept tokens' original positions [3, tokens]."""
        if self.compressor is not None and (self._offset_rows or _capturing(positions)):
            # In place: piecewise CUDA graphs read the address that they were captured with, the runner's buffer,
            # which both runners write anew in every step. A fully captured graph replays this addition on whatever
            # the offsets then are: zeros in a decode step.
            positions += self._position_offsets[: positions.shape[-1]].T
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def _row_offsets(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, 3] int64: what video rows carry; zeros for images, whose positions are exact already."""
    if rows.shape[-1] == width:
        return torch.zeros(rows.shape[0], 3, dtype=torch.int64, device=rows.device)
    return unpack_offsets(rows[:, width : width + POSITION_CHANNELS])


def _capturing(positions: torch.Tensor) -> bool:
    return positions.is_cuda and torch.cuda.is_current_stream_capturing()
