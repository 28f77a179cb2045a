"""What every model family shares: vLLM's processor and model contracts, bent to K tokens per video.

How a compressed video passes through vLLM:

1. the processor writes K placeholders, K = ``num_retained_tokens(T * N, ratio)``, before the vision tower runs;
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

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from score_vllm import methods
from score_vllm.budget import check_retention_ratio, num_retained_tokens
from score_vllm.compressor import select_retained
from score_vllm.config import ServingConfig
from score_vllm.models.timing import CompressorTimer
from score_vllm.policy import RetentionPolicy
from score_vllm.positions import (
    POSITION_CHANNELS,
    VisualSpan,
    pack_offsets,
    position_extent,
    prompt_positions,
    unpack_offsets,
    video_offsets,
)
from score_vllm.types import VideoGrid

if TYPE_CHECKING:
    from vllm.config import VllmConfig

RATIO_KEY = "retention_ratio"
NUM_RETAINED_KEY = "score_num_retained"
REPORT_KEY = "score"

# Rotary tables of vLLM's M-RoPE models hold this many times max_position_embeddings.
_ROTARY_TABLE_FACTOR = 4


class RetentionRatioError(VLLMValidationError, ValueError):
    """A client's ratio is wrong: 400 with the field's name in the server, ValueError for library users."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter=RATIO_KEY)  # type: ignore[call-arg]


def grid_of(grid_thw: torch.Tensor, merge_size: int) -> VideoGrid:
    """Token grid after the merger, from a [3] patch grid."""
    t, h, w = (int(value) for value in grid_thw)
    return VideoGrid(t, h // merge_size, w // merge_size)


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What happened to one video; becomes an entry of the response's ``score.videos``."""

    grid: VideoGrid
    original_tokens: int
    retained_tokens: int
    retention_ratio: float
    position_extent: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "grid": [self.grid.t, self.grid.h, self.grid.w],
            "original_tokens": self.original_tokens,
            "retained_tokens": self.retained_tokens,
            "retention_ratio": self.retention_ratio,
        }


@dataclass
class _CompressedPlaceholder(PromptUpdateDetails):
    """K placeholder tokens, with the report that vLLM's processor cache must keep beside them."""

    report: VideoReport | None = None


# The reports of the call of ``apply`` in progress: processors are shared between threads.
_reports: ContextVar[list[VideoReport]] = ContextVar("score_video_reports")


class CompressionProcessorMixin:
    """Put before a family's multimodal processor; inert where no serving configuration is present."""

    def _setup_compression(self, video_token: str) -> None:
        info: Any = self.info  # type: ignore[attr-defined]
        config = info.get_hf_config()
        self.serving = ServingConfig.from_hf_config(config)
        self._video_token_id = info.get_tokenizer().get_vocab()[video_token]
        self._merge_size = config.vision_config.spatial_merge_size
        self._tokens_per_second = float(getattr(config.vision_config, "tokens_per_second", 1.0))
        self._max_position = info.ctx.model_config.hf_text_config.max_position_embeddings * _ROTARY_TABLE_FACTOR

    def _resolve_ratios(self, inputs: Any) -> tuple[float, ...]:
        """One ratio per video of the request; the server's default where it names none."""
        assert self.serving is not None
        videos = inputs.mm_data_items.get("video")
        count = len(videos) if videos is not None else 0
        asked = inputs.hf_processor_mm_kwargs.get(RATIO_KEY)
        if asked is None:
            return (self.serving.retention_ratio,) * count
        try:
            if isinstance(asked, Sequence) and not isinstance(asked, str):
                if len(asked) != count:
                    raise ValueError(
                        f"{RATIO_KEY} must be one number or a list with one number in (0, 1] per video; "
                        f"got {len(asked)} for {count} video(s)"
                    )
                return tuple(check_retention_ratio(r, f"{RATIO_KEY}[{i}]") for i, r in enumerate(asked))
            return (check_retention_ratio(asked),) * count
        except (TypeError, ValueError) as error:
            raise RetentionRatioError(str(error)) from error

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Profile memory with nothing dropped: a request may ask for ratio 1."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.serving is not None:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, RATIO_KEY: 1.0}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's door; adds a ``score`` report of the videos to the result."""
        if self.serving is None:
            if RATIO_KEY in inputs.hf_processor_mm_kwargs:
                raise RetentionRatioError(f"{RATIO_KEY} was given, but this engine runs without SCORE compression")
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        kwargs = {**inputs.hf_processor_mm_kwargs, RATIO_KEY: self._resolve_ratios(inputs)}
        reports: list[VideoReport] = []
        token = _reports.set(reports)
        try:
            result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]
        finally:
            _reports.reset(token)
        self._check_position_range(len(result["prompt_token_ids"]), reports)
        result[REPORT_KEY] = reports
        return result

    def _check_position_range(self, num_tokens: int, reports: Sequence[VideoReport]) -> None:
        """Positions outside the rotary table would read wild memory on a GPU: refuse them here."""
        last = num_tokens + sum(report.position_extent for report in reports)
        if last > self._max_position:
            raise ValueError(
                f"the video spans {last} positions and the model has {self._max_position}: "
                "its duration is too long, or its frame rate metadata is wrong"
            )

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Ratio, method and policy become part of each video's identity; images keep theirs."""
        if self.serving is None:
            return super()._get_mm_hashes(inputs)  # type: ignore[misc]
        ratios, clean = _split_ratios(inputs.hf_processor_mm_kwargs)
        hashes = dict(super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=clean)))  # type: ignore[misc]
        if "video" in hashes:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(algorithm, mm_hash=digest, score=self.serving.cache_key(ratio))
                for digest, ratio in zip(hashes["video"], ratios, strict=True)
            ]
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]) -> Any:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        if self.serving is None or "video" not in mm_is_cached:
            return kwargs
        ratios, clean = _split_ratios(kwargs)
        missing = tuple(r for r, hit in zip(ratios, mm_is_cached["video"], strict=True) if not hit)
        return {**clean, RATIO_KEY: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        """Run the family's processor without our key, then fix K once, for every later use."""
        ratios, clean = _split_ratios(hf_kwargs)
        try:
            data = super()._apply_hf_processor_main(mm_items, clean)  # type: ignore[misc]
        except ValueError as error:
            # vLLM's message prints every pixel; its cause says what was wrong.
            if self.serving is None or error.__cause__ is None:
                raise
            raise ValueError(f"the model's processor refused a video or image: {error.__cause__}") from error
        if self.serving is not None and "video_grid_thw" in data:
            grids = [grid_of(thw, self._merge_size) for thw in data["video_grid_thw"]]
            kept = [num_retained_tokens(g.num_tokens, r) for g, r in zip(grids, ratios, strict=True)]
            data[NUM_RETAINED_KEY] = torch.tensor(kept, dtype=torch.int64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        _, clean = _split_ratios(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, clean))  # type: ignore[misc]
        if self.serving is not None:
            fields[NUM_RETAINED_KEY] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        ratios, clean = _split_ratios(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, clean, out_mm_kwargs)  # type: ignore[misc]
        if self.serving is None:
            return updates

        def placeholders(item_idx: int) -> _CompressedPlaceholder:
            item = out_mm_kwargs["video"][item_idx]
            report = self._report(item, ratios[item_idx])
            return _CompressedPlaceholder(full=[self._video_token_id] * report.retained_tokens, report=report)

        video = PromptReplacement(modality="video", target=[self._video_token_id], replacement=placeholders)
        return [update for update in updates if update.modality != "video"] + [video]

    def _report(self, item: Any, ratio: float) -> VideoReport:
        grid = grid_of(item["video_grid_thw"].data, self._merge_size)
        retained = int(item[NUM_RETAINED_KEY].data)
        extent = position_extent(grid, temporal_factor(item, self._tokens_per_second))
        return VideoReport(grid, grid.num_tokens, retained, ratio, extent)

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        if self.serving is not None:
            for updates in mm_res.prompt_updates.get("video", []):
                _reports.get().append(updates[0].content.report)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]


def _split_ratios(kwargs: Mapping[str, Any]) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Our key would make vLLM load a Hugging Face processor per distinct ratio; it never goes further than here."""
    clean = dict(kwargs)
    return clean.pop(RATIO_KEY, ()), clean


def temporal_factor(item: Mapping[str, Any], tokens_per_second: float) -> float:
    """Positions per temporal cell of one video item: seconds per cell times tokens per second."""
    seconds = item.get("second_per_grid_ts")
    return (1.0 if seconds is None else float(seconds.data)) * tokens_per_second


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
        self.timer = CompressorTimer(serving.stats_dir if get_tensor_model_parallel_rank() == 0 else None)
        methods.get(serving.method)
        self.policy: RetentionPolicy | None = None
        if serving.policy is not None:
            self.policy = load_policy(serving.policy, hidden_size)
            if serving.policy_digest and self.policy.digest() != serving.policy_digest:
                raise ValueError(
                    f"policy {serving.policy} changed on disk while the server was starting; start it again"
                )

    def compress(self, x: torch.Tensor, grid: VideoGrid, t_factor: float, num_retained: int) -> torch.Tensor:
        """Keep K tokens of a video and append their position channels.

        Args:
            x: [T * N, D] output of the vision tower's merger.
            grid: T, rows, columns.
            t_factor: positions per temporal cell.
            num_retained: K.

        Returns:
            [K, D + 9] in the dtype of ``x``.
        """
        with self.timer.measure(x.device):
            if self.policy is not None:
                self.policy.to(x.device)
            video = x.view(grid.t, grid.tokens_per_frame, x.shape[-1])
            kept, _ = select_retained(video, num_retained, self.serving.method, policy=self.policy)
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
    if getattr(parallel, "enable_dbo", False):
        raise ValueError("SCORE does not support --enable-dbo: micro-batches would lose the positions of kept tokens")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
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

    def _setup_compression(self, vllm_config: VllmConfig) -> None:
        serving = ServingConfig.from_hf_config(vllm_config.model_config.hf_config)
        if serving is None:
            return
        check_engine_config(vllm_config)
        hidden_size = vllm_config.model_config.get_hidden_size()
        # Past the parameters on purpose: the checkpoint loader must not look for the policy's weights.
        object.__setattr__(self, "compressor", VideoCompressor(serving, hidden_size))
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(scheduler.max_num_batched_tokens, captured)
        # [tokens of a step, 3]; all zero except in a step that has visual rows.
        device = vllm_config.device_config.device
        self._position_offsets = torch.zeros(rows, 3, dtype=torch.int64, device=device)
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
            # Out of place: the runner's buffer belongs to the runner. A captured graph replays this addition on
            # whatever the offsets buffer then holds: zeros in a decode step.
            positions = positions + self._position_offsets[: positions.shape[-1]].T
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def _row_offsets(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, 3] int64: what video rows carry; zeros for images, whose positions are exact already."""
    if rows.shape[-1] == width:
        return torch.zeros(rows.shape[0], 3, dtype=torch.int64, device=rows.device)
    return unpack_offsets(rows[:, width : width + POSITION_CHANNELS])


def _capturing(positions: torch.Tensor) -> bool:
    return positions.is_cuda and torch.cuda.is_current_stream_capturing()
