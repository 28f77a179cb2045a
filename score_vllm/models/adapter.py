"""What every model family shares: vLLM's model contract for the kept tokens of a video.

How a compressed video passes through vLLM:

1. the processor (:mod:`score_vllm.models.processing`) works out the video's span (:mod:`score_vllm.layout`) and writes
   S + K placeholders, S structure tokens and K = ``num_retained_tokens(T * N, ratio)``, before the vision tower runs;
2. ``embed_multimodal`` encodes one video at a time, selects K tokens, and emits S + K rows in the order of the unpruned
   span. To each row it appends the offset of its position from the video's base as base-256 digits (exact in bf16),
   and, where structure is text, its token id;
3. ``get_mrope_input_positions`` gives exact positions to all text and images, and the base to every video slot;
4. ``embed_input_ids`` strips the digits, puts text rows in, and keeps the decoded offsets; ``forward`` adds them to the
   positions.

Step 4 depends on no state of the request, so prefix-cache hits, chunk boundaries inside a video, several videos
and images beside them need no repair, and vLLM's own pruning switch, with its hooks in the runners, stays off.
A step without visual rows does no position work. Why vLLM's own hooks are not used: docs/internals.md.

One file: vLLM's contract is one class, and its four steps above share state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from score_vllm import methods
from score_vllm.config import SPECULATIVE_METHODS, ServingConfig, cell_cache_bytes
from score_vllm.kernels import ops
from score_vllm.kernels.inputs import PolicyWeights, PositionTable
from score_vllm.layout import AXES, VideoLayout
from score_vllm.models.cell_records import EncodedCellsWriter
from score_vllm.models.cells import ROWS, CellEncoder, Values
from score_vllm.models.processing import (
    CELLS_KEY,
    IDENTITY_KEY,
    LAYOUT_KEY,
    METHOD_INDEX_KEY,
    NUM_RETAINED_KEY,
    TICKET_KEY,
    identity_of,
)
from score_vllm.models.selections import RecentSelections
from score_vllm.models.timing import CompressorStats, stats_directory
from score_vllm.policy import RetentionPolicy
from score_vllm.positions import POSITION_CHANNELS, VisualSpan, prompt_positions, unpack_offsets
from score_vllm.select import select_retained

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class VideoCompressor:
    """Selects and packs the rows of one video, inside the worker. Not a module: it owns no checkpoint weights.

    Args:
        serving: the serving configuration.
        hidden_size: D of the language model.
        architecture: vLLM's name of the model.
        tokens_per_second: positions per second of video, where the model's positions follow the clock.

    Attributes:
        cells: decides what the tower encodes; made by :meth:`prepare_cells`.

    Raises:
        ValueError: unknown method, or weights that do not fit the model.
        FileNotFoundError: a directory of weights is missing or incomplete.
    """

    def __init__(
        self, serving: ServingConfig, hidden_size: int, architecture: str, tokens_per_second: float | None = None
    ) -> None:
        self.serving = serving
        self.hidden_size = hidden_size
        self.architecture = architecture
        self.tokens_per_second = tokens_per_second
        # One worker per tensor-parallel group reports, or every video would count several times.
        self._directory = stats_directory() if get_tensor_model_parallel_rank() == 0 else None
        self.stats = CompressorStats(self._directory)
        self.cells: CellEncoder | None = None
        self.selections = RecentSelections()
        # Weights of the learned methods besides score, on the CPU until prepare() moves them.
        self.selector_weights: dict[str, Any] = {}
        for name in serving.methods:
            methods.get(name)  # refuses an unknown one
            if name not in methods.learned_names():
                continue
            source = serving.selectors.get(name)
            if source is None:
                raise ValueError(f"method {name!r} needs the directory of its weights in selectors")
            self.selector_weights[name] = methods.load_weights(name, source, hidden_size, architecture)
            if serving.selector_digests.get(name, "") not in ("", self.selector_weights[name].digest()):
                raise ValueError(f"selector {source} changed on disk while the server was starting; start it again")
        self.policy: RetentionPolicy | None = None
        self._weights: PolicyWeights | None = None
        if serving.policy is not None:
            self.policy = load_policy(serving.policy, hidden_size, architecture)
            if serving.policy_digest and self.policy.digest() != serving.policy_digest:
                raise ValueError(
                    f"policy {serving.policy} changed on disk while the server was starting; start it again"
                )

    def prepare(self, dtype: torch.dtype, device: torch.device, row_width: int) -> dict[str, torch.Tensor]:
        """Pack the policy and compile the kernels at start-up, so that no request waits for it.

        Returns:
            The packed tensors by name. Whoever frees or restores the model's memory must know of them.
        """
        named: dict[str, torch.Tensor] = {}
        for method, on_cpu in self.selector_weights.items():
            weights = self.selector_weights[method] = on_cpu.to(device)
            named |= {f"{method}_{name}": tensor for name, tensor in weights.named_tensors().items()}
        if self.policy is None:
            return named
        policy = self._policy_weights(dtype, device)
        if device.type == "cuda":
            ops.warm_up(policy, row_width)
        packed = {field.name: getattr(policy, field.name) for field in fields(policy)}
        return named | {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}

    def prepare_cells(self, dtype: torch.dtype, device: torch.device, row_width: int) -> dict[str, torch.Tensor]:
        """Allocate the cell cache before memory is profiled; its tensors by name, as of :meth:`prepare`."""
        kinds = sorted({kind for name in self.serving.methods if (kind := methods.get(name).saliency)})
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        capacity = cell_cache_bytes(self.serving.cell_cache_gib, memory)
        records = EncodedCellsWriter(self._directory)
        self.cells = CellEncoder(capacity, row_width, kinds, dtype, device, self.stats, records)
        return self.cells.stores

    def _policy_weights(self, dtype: torch.dtype, device: torch.device) -> PolicyWeights:
        """The policy in the dtype and on the device of the tokens, cast once."""
        if self._weights is None or (self._weights.w_in.dtype, self._weights.w_in.device) != (dtype, device):
            assert self.policy is not None, "checked by ServingConfig"
            # The policy itself stays on the CPU, where sleep mode does not reach it.
            policy = self.policy
            w_in, b_in, w_out, b_out = (p.to(device) for p in policy.weights())
            self._weights = ops.pack_weights(w_in, b_in, w_out, b_out, dtype, policy.config.use_residual)
        return self._weights

    @property
    def needs_saliency(self) -> bool:
        """True where a served method ranks by attention."""
        return any(methods.get(name).saliency for name in self.serving.methods)

    def compress(
        self,
        x: torch.Tensor,
        layout: VideoLayout,
        num_retained: int,
        method: str,
        saliency: torch.Tensor | None = None,
        learned: torch.Tensor | None = None,
        key: str = "",
    ) -> torch.Tensor:
        """Keep K tokens of a video and append their channels, its structure rows between them.

        Args:
            x: [T * N, W] output of the vision tower's merger; methods read the first D columns, the rest (deepstack
                levels) travels with the kept rows.
            layout: of the video.
            num_retained: K.
            method: one of the serving configuration's methods.
            saliency: [T, N] for the methods that need one.
            learned: [D] content of structure rows that are no text.
            key: by which the selection can be asked for afterwards; empty: it cannot.

        Returns:
            [S + K, W + 9 or 12] in the dtype of ``x``.
        """
        with self.stats.measure(x.device) as measured:
            video = x.view(layout.grid.t, layout.grid.tokens_per_frame, x.shape[-1])
            table = PositionTable.from_layout(layout)
            if method == "score":
                weights = self._policy_weights(x.dtype, x.device)
                assert self.policy is not None, "checked by ServingConfig"
                even = self.policy.spread(layout.grid, num_retained)
                out = ops.select_rows(
                    video, weights, num_retained, table, width=self.hidden_size, learned=learned, always=even
                )
                measured.has_nan = out.has_nan
                self.selections.keep(key, layout.grid, out.indices)
                return out.buffer
            read = video[..., : self.hidden_size]
            seconds = None
            if self.tokens_per_second:
                seconds = torch.from_numpy(layout.cells[:, 1] / self.tokens_per_second)
            kept, measured.has_nan = select_retained(
                read,
                num_retained,
                method,
                variant=methods.variant_for(methods.get(method), self.architecture),
                saliency=saliency,
                grid=layout.grid,
                seconds=seconds,
                weights=self.selector_weights.get(method),
            )
            self.selections.keep(key, layout.grid, kept.indices)
            return ops.gather(video, kept.indices, table, learned=learned, rows=kept.embeddings)


def load_policy(directory: str, hidden_size: int, architecture: str) -> RetentionPolicy:
    """Load a policy and check that it was made for the model's tokens.

    Raises:
        ValueError: its hidden size or architecture differs from the model's; both are in the message.
        FileNotFoundError: see :meth:`RetentionPolicy.from_pretrained`.
    """
    with torch.device("cpu"):  # while vLLM builds a model, tensors are made on its GPU
        policy = RetentionPolicy.from_pretrained(directory)
    policy.check_model(directory, hidden_size, architecture)
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
    # Positions per second of video, where the model's positions follow the clock.
    tokens_per_second: float | None = None
    _position_offsets: torch.Tensor

    @property
    def row_width(self) -> int:
        """Columns of a visual row: D, or more where levels of the tower travel with it."""
        assert self.compressor is not None
        return self.compressor.hidden_size

    @property
    def learned_row(self) -> torch.Tensor | None:
        """[D] content of structure rows that are a parameter of the model."""
        return None

    def image_layout(self, data: Mapping[str, Any], length: int) -> VideoLayout:
        """Positions of an image of ``length`` slots, from its fields."""
        raise NotImplementedError

    def _setup_compression(self, vllm_config: VllmConfig) -> None:
        serving = ServingConfig.from_hf_config(vllm_config.model_config.hf_config)
        if serving is None:
            return
        check_engine_config(vllm_config)
        model_config = vllm_config.model_config
        hidden_size, architecture = model_config.get_hidden_size(), model_config.architecture
        # Past the parameters on purpose: the checkpoint loader must not look for the policy's weights.
        object.__setattr__(
            self, "compressor", VideoCompressor(serving, hidden_size, architecture, self.tokens_per_second)
        )
        assert self.compressor is not None
        device = vllm_config.device_config.device
        dtype = model_config.dtype
        packed = self.compressor.prepare(dtype, device, self.row_width)
        stores = self.compressor.prepare_cells(dtype, device, self.row_width)
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(scheduler.max_num_batched_tokens, captured)
        # [tokens of a step, 3]; all zero except in a step that has visual rows.
        offsets = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        # Buffers, so that vLLM's sleep mode saves and restores them; not persistent: no checkpoint has to hold them.
        buffers = {f"_policy_{k}": v for k, v in packed.items()} | {f"_cells_{k}": v for k, v in stores.items()}
        for name, tensor in {"_position_offsets": offsets, **buffers}.items():
            self.register_buffer(name, tensor, persistent=False)  # type: ignore[attr-defined]
        self._offset_rows = 0

    def prompt_spans(self, mm_features: Sequence[Any]) -> list[VisualSpan]:
        """Images and videos of a prompt in order, from vLLM's feature specs."""
        spans = []
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            start, length = feature.mm_position.offset, feature.mm_position.length
            if feature.modality == "video":
                layout = VideoLayout.from_tensor(feature.data[LAYOUT_KEY].data)
                spans.append(VisualSpan(start, length, layout.extent))
            else:
                spans.append(VisualSpan.unpruned(start, self.image_layout(feature.data, length)))
        return spans

    def _parse_and_validate_video_input(self, **kwargs: Any) -> Any:
        """vLLM's, with all fields beside it where videos are compressed."""
        video_input = super()._parse_and_validate_video_input(**kwargs)  # type: ignore[misc]
        return video_input if self.compressor is None or video_input is None else (video_input, kwargs)

    def encode_cells(
        self, fields: Mapping[str, Any], index: int, kind: str | None, tower: Callable[[list[int]], Values]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tower's rows [T * N, W] of a video, and its saliency [T, N].

        Args:
            fields: what the processor wrote of the videos.
            index: which of them.
            kind: of saliency; None where the method reads none.
            tower: encodes some of the video's cells.
        """
        assert self.compressor is not None
        assert self.compressor.cells is not None
        names = (ROWS,) if kind is None else (ROWS, kind)
        values = self.compressor.cells.encode(fields[CELLS_KEY][index], int(fields[TICKET_KEY][index]), names, tower)
        return values[ROWS].flatten(0, 1), None if kind is None else values[kind]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """vLLM's; what another tower made of a cell is forgotten."""
        loaded = super().load_weights(weights)  # type: ignore[misc]
        if self.compressor is not None and self.compressor.cells is not None:
            self.compressor.cells.clear()
        return loaded

    def saliency_kinds(self, fields: Mapping[str, Any]) -> list[str | None]:
        """Per video the kind of saliency that its method ranks by."""
        assert self.compressor is not None
        names = self.compressor.serving.methods
        return [methods.get(names[int(index)]).saliency for index in fields[METHOD_INDEX_KEY]]

    def compress_videos(
        self, fields: Mapping[str, Any], encoded: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> tuple[torch.Tensor, ...]:
        """[S + K, W + channels] rows of each video.

        Args:
            fields: what the processor wrote of the videos.
            encoded: per video its rows [T * N, W] and saliency; an iterator, so that one exists at a time.
        """
        assert self.compressor is not None
        methods_of = self.compressor.serving.methods
        outputs = []
        timed = self.compressor.stats.encoding(encoded, fields[TICKET_KEY], self._position_offsets.device)
        own = (fields[name] for name in (LAYOUT_KEY, NUM_RETAINED_KEY, METHOD_INDEX_KEY, IDENTITY_KEY))
        for (x, saliency), packed, kept, index, identity in zip(timed, *own, strict=True):
            layout, method, key = VideoLayout.from_tensor(packed), methods_of[int(index)], identity_of(identity)
            outputs.append(self.compressor.compress(x, layout, int(kept), method, saliency, self.learned_row, key))
        return tuple(outputs)

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
            self.compressor.stats.collect()
            if self._offset_rows:
                self._position_offsets[: self._offset_rows].zero_()
                self._offset_rows = 0
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                assert is_multimodal is not None
                self._offset_rows = len(is_multimodal)
                multimodal_embeddings = self._unpack_rows(input_ids, multimodal_embeddings, is_multimodal)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def _unpack_rows(
        self, input_ids: torch.Tensor, items: Sequence[torch.Tensor], is_multimodal: torch.Tensor
    ) -> list[torch.Tensor]:
        """Rows without their channels, text rows embedded; the offsets go to their slots. No host sync.

        Args:
            input_ids: [N] of the step.
            items: rows of each image or video in the step, [M_i, W] or [M_i, W + channels].
            is_multimodal: [N] bool, true in M places.

        Returns:
            [M_i, W] each.
        """
        width = self.row_width
        channels = torch.cat([_channels(item, width) for item in items])
        slots = torch.nonzero_static(is_multimodal, size=len(channels))[:, 0]
        self._position_offsets.index_copy_(0, slots, channels[:, :AXES])
        rows = [item[:, :width] for item in items]
        if all(item.shape[1] <= width + POSITION_CHANNELS for item in items):
            return rows
        # The language model's own embeddings, looked up where its text is: adapters and shards need no care here.
        text = channels[:, AXES]
        ids = input_ids.index_copy(0, slots, torch.where(text > 0, text - 1, input_ids[slots]).to(input_ids.dtype))
        embedded = self.get_language_model().embed_input_ids(ids)[slots]  # type: ignore[attr-defined]
        whole = torch.cat(rows)
        hidden = embedded.shape[1]
        merged = torch.where((text > 0)[:, None], embedded, whole[:, :hidden])
        return list(torch.cat([merged, whole[:, hidden:]], dim=1).split([len(item) for item in items]))

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
            # which both runners write anew in every step. A fully captured graph replays this on whatever the offsets
            # then are: zeros in a decode step. Used once: a dummy run does not embed, and would add them again.
            offsets = self._position_offsets[: positions.shape[-1]]
            positions += offsets.T
            offsets.zero_()
            self._offset_rows = 0
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def _channels(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, 4] int64 (t, h, w, token id + 1): what video rows carry; zeros for images, whose positions are exact."""
    unpacked = unpack_offsets(rows[:, width:])
    return torch.nn.functional.pad(unpacked, (0, AXES + 1 - unpacked.shape[1]))


def _capturing(positions: torch.Tensor) -> bool:
    return positions.is_cuda and torch.cuda.is_current_stream_capturing()
