"""The processor's half of the adapter: the span of each video, cache identities, and the report of what was done.

A family's processor adds :meth:`CompressionProcessorMixin.video_layouts`; all else is shared.

One file: vLLM's processor is one class, whose methods hand one request's specs on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from score_vllm import methods
from score_vllm.budget import check_retention_ratio, num_retained_tokens
from score_vllm.config import ServingConfig
from score_vllm.layout import LEARNED, VideoLayout
from score_vllm.models import media  # noqa: F401  (registers connector and loaders where requests are processed)
from score_vllm.models.cell_records import draw_ticket
from score_vllm.models.video_options import VideoOptions
from score_vllm.policy import RetentionPolicy
from score_vllm.types import VideoGrid

# What a request may say, among vLLM's ``mm_processor_kwargs``.
RATIO_KEY = "retention_ratio"
METHOD_KEY = "retention_method"
OPTIONS_KEY = "video_options"
OWN_KEYS = (RATIO_KEY, METHOD_KEY, OPTIONS_KEY)
# The same, resolved to one spec per video, on its way through the processor. It goes no further: vLLM would load a
# Hugging Face processor for every distinct value.
SPECS_KEY = "score_specs"
# Per video, on its way to the worker: its :meth:`VideoLayout.to_tensor`, K, and the method as an index into
# ``ServingConfig.methods``. They stay on the CPU, where the scheduler keeps them for prompts that hit the prefix cache.
LAYOUT_KEY = "score_layout"
NUM_RETAINED_KEY = "score_num_retained"
METHOD_INDEX_KEY = "score_method_index"
# [T, 4] int64 per video, see :func:`cell_keys`, and the name under which the worker says how many it encoded.
CELLS_KEY = "score_cells"
TICKET_KEY = "score_ticket"
# The video's identity in vLLM's caches, as bytes: by it a worker finds again what it kept of the video.
IDENTITY_KEY = "score_identity"
FIELDS = (LAYOUT_KEY, NUM_RETAINED_KEY, METHOD_INDEX_KEY, CELLS_KEY, TICKET_KEY, IDENTITY_KEY)
REPORT_KEY = "score"


class RequestFieldError(VLLMValidationError, ValueError):
    """A field of a request is wrong: 400 with its name in the server, ValueError for library users."""

    def __init__(self, message: str, field: str = RATIO_KEY) -> None:
        super().__init__(message, parameter=field)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """What one video is read and compressed by."""

    retention_ratio: float
    method: str
    options: VideoOptions


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What happened to one video; becomes an entry of the response's ``score.videos``.

    ``ticket`` is None for embeddings, which no tower encodes.
    """

    grid: VideoGrid
    retained_tokens: int
    spec: VideoSpec
    position_extent: int
    structure_tokens: int = 0
    read: Mapping[str, Any] | None = None
    ticket: int | None = None
    times: Sequence[float] | None = None
    identity: str = ""

    @property
    def cell_seconds(self) -> list[float] | None:
        """[T] second of the first frame of each cell; None where the frames came without times."""
        if self.times is None:
            return None
        frames, cells = len(self.times), self.grid.t
        return [round(float(self.times[-(-cell * frames // cells)]), 3) for cell in range(cells)]

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "grid": [self.grid.t, self.grid.h, self.grid.w],
            "original_tokens": self.grid.num_tokens,
            "retained_tokens": self.retained_tokens,
            "structure_tokens": self.structure_tokens,
            "retention_ratio": self.spec.retention_ratio,
            **(self.read or {}),
        }


@dataclass
class _CompressedPlaceholder(PromptUpdateDetails):
    """The tokens of a video's span, with the report that vLLM's processor cache must keep beside them."""

    report: VideoReport | None = None


# The reports of the call of ``apply`` in progress: processors are shared between threads.
_reports: ContextVar[list[VideoReport]] = ContextVar("score_video_reports")


class CompressionProcessorMixin:
    """Put before a family's multimodal processor; inert where no serving configuration is present."""

    # vLLM's rotary table of this family holds this many times max_position_embeddings.
    rotary_table_factor = 4
    # Whether precomputed embeddings bring what a layout is made from.
    takes_embeddings = True

    def video_layouts(self, data: Mapping[str, Any], items: Any) -> list[VideoLayout]:
        """The span of each video; empty where there is none.

        Args:
            data: output of the family's Hugging Face processor.
            items: the same videos as vLLM holds them, with their metadata; None where there are none.
        """
        raise NotImplementedError

    def video_pixels(self, data: Mapping[str, Any], layouts: Sequence[VideoLayout]) -> list[torch.Tensor | None]:
        """[T, ...] pixels of each video, a cell at a time, in the processor's output; None of embeddings."""
        pixels = data.get("pixel_values_videos")
        if pixels is None:
            return [None] * len(layouts)
        if "video_grid_thw" in data:  # one row per patch, cell after cell
            counts = [int(thw.prod()) for thw in data["video_grid_thw"]]
            pixels = pixels.split(counts)
        return [one.reshape(layout.grid.t, -1, one.shape[-1]) for one, layout in zip(pixels, layouts, strict=True)]

    def _setup_compression(self, video_token: str, row_token: str | None = None) -> None:
        """``row_token`` stands in the prompt for a vision row, where that is not ``video_token``."""
        info: Any = self.info  # type: ignore[attr-defined]
        config = info.get_hf_config()
        self.serving = ServingConfig.from_hf_config(config)
        vocabulary = info.get_tokenizer().get_vocab()
        self._video_token_id = vocabulary[video_token]
        self._row_token_id = vocabulary[row_token or video_token]
        model_config = info.ctx.model_config
        self._max_length = model_config.max_model_len
        self._max_position = model_config.hf_text_config.max_position_embeddings * self.rotary_table_factor
        if self.serving is not None and self.serving.policy is not None and not self.serving.policy_digest:
            # Outside score-serve nobody has worked it out; two policies must never share a cache entry.
            digest = RetentionPolicy.from_pretrained(self.serving.policy).digest()
            self.serving = replace(self.serving, policy_digest=digest)

    def _resolve_specs(self, inputs: Any) -> tuple[VideoSpec, ...]:
        """One spec per video of the request; the server's defaults where it names none."""
        assert self.serving is not None
        videos = inputs.mm_data_items.get("video")
        count = len(videos) if videos is not None else 0
        asked = inputs.hf_processor_mm_kwargs
        method = self._resolve_method(asked.get(METHOD_KEY))
        if isinstance(videos, EmbeddingItems | DictEmbeddingItems) and not self.takes_embeddings:
            raise RequestFieldError("video_embeds cannot be compressed with this model: send the video", "video_embeds")
        if isinstance(videos, EmbeddingItems | DictEmbeddingItems) and methods.get(method).saliency:
            others = [name for name in self.serving.methods if not methods.get(name).saliency]
            raise RequestFieldError(
                f"{METHOD_KEY} {method!r} ranks by the vision tower's attention, which video_embeds do not have: send "
                f"the video itself, or ask for one of {others}",
                METHOD_KEY,
            )
        ratios = resolve_ratios(asked.get(RATIO_KEY), count, self.serving.retention_ratio)
        options = asked.get(OPTIONS_KEY) or (VideoOptions(),) * count
        if len(options) != count or not all(isinstance(option, VideoOptions) for option in options):
            raise RequestFieldError(f"{OPTIONS_KEY} must hold one VideoOptions per video", OPTIONS_KEY)
        return tuple(VideoSpec(ratio, method, option) for ratio, option in zip(ratios, options, strict=True))

    def _resolve_method(self, asked: Any) -> str:
        assert self.serving is not None
        if asked is None:
            return self.serving.method
        if asked not in self.serving.methods:
            raise RequestFieldError(
                f"{METHOD_KEY} must be one of {list(self.serving.methods)} on this server, got {asked!r}", METHOD_KEY
            )
        return asked

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Profile memory with nothing dropped: a request may ask for ratio 1."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.serving is not None:
            inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, RATIO_KEY: 1.0}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's entry point; adds a ``score`` report of the videos to the result."""
        if self.serving is None:
            for key in OWN_KEYS:
                if key in inputs.hf_processor_mm_kwargs:
                    raise RequestFieldError(f"{key} was given, but this engine runs without SCORE compression", key)
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        kwargs = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if k not in OWN_KEYS}
        kwargs[SPECS_KEY] = self._resolve_specs(inputs)
        reports: list[VideoReport] = []
        token = _reports.set(reports)
        try:
            result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]
        finally:
            _reports.reset(token)
        try:
            self._check_context(reports)
            self._check_position_range(reports)
        except RequestFieldError:
            forget_items(inputs.cache, result)
            raise
        result[REPORT_KEY] = reports
        return result

    def _check_context(self, reports: Sequence[VideoReport]) -> None:
        """Say which ratio fits, where the kept tokens alone are more than a prompt may have."""
        kept = sum(report.retained_tokens for report in reports)
        if kept >= self._max_length:
            original = sum(report.grid.num_tokens for report in reports)
            raise RequestFieldError(
                f"{kept} of {original} visual tokens would be kept, and a prompt has less than {self._max_length} "
                f"(--max-model-len); ask for a {RATIO_KEY} below {self._max_length / original:.2g}"
            )

    def _check_position_range(self, reports: Sequence[VideoReport]) -> None:
        """Positions outside the rotary table would read wild memory: refuse what could reach them, decode included."""
        spanned = sum(report.position_extent for report in reports)
        slots = sum(report.retained_tokens + report.structure_tokens for report in reports)
        room = self._max_position - self._max_length + slots
        if spanned > room:
            raise RequestFieldError(
                f"the videos span {spanned} positions, of which the model has {room} beside the longest text of "
                f"--max-model-len {self._max_length}: they last too long, their frame rate metadata is wrong, or "
                "--max-model-len leaves too few",
                "video_url",
            )

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Ratio, method and policy become part of each video's identity; images keep theirs."""
        if self.serving is None:
            return super()._get_mm_hashes(inputs)  # type: ignore[misc]
        specs, clean = _split_specs(inputs.hf_processor_mm_kwargs)
        hashes = dict(super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=clean)))  # type: ignore[misc]
        if "video" in hashes:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm  # type: ignore[attr-defined]
            hashes["video"] = [
                MultiModalHasher.hash_kwargs(
                    algorithm,
                    mm_hash=digest,
                    score=self.serving.cache_key(spec.retention_ratio, spec.method),
                    options=spec.options.cache_key(),
                    max_pixels=self.info.video_limit.max_pixels,  # type: ignore[attr-defined]
                )
                for digest, spec in zip(hashes["video"], specs, strict=True)
            ]
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]) -> Any:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        if self.serving is None or "video" not in mm_is_cached:
            return kwargs
        specs, clean = _split_specs(kwargs)
        missing = tuple(spec for spec, hit in zip(specs, mm_is_cached["video"], strict=True) if not hit)
        return {**clean, SPECS_KEY: missing}

    def _apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """Without vLLM's processor cache: every video is new."""
        result = super()._apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        self._identify(result.kwargs, result.hashes.get("video", ()))
        return result

    def _merge_mm_kwargs(
        self, cache: Any, mm_hashes: Any, mm_is_cached: Any, mm_missing_kwargs: Any, mm_missing_prompt_updates: Any
    ) -> Any:
        """With it: those that it does not hold are, and go into it with their identities."""
        pairs = zip(mm_hashes.get("video", ()), mm_is_cached.get("video", ()), strict=True)
        self._identify(mm_missing_kwargs, [digest for digest, hit in pairs if not hit])
        return super()._merge_mm_kwargs(  # type: ignore[misc]
            cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
        )

    def _identify(self, kwargs: Any, digests: Sequence[str]) -> None:
        """Let each video carry its identity to the worker."""
        if self.serving is not None and digests:
            values = [torch.tensor(list(digest.encode()), dtype=torch.uint8) for digest in digests]
            field = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
            for item, elem in zip(kwargs["video"], field.build_elems(IDENTITY_KEY, values), strict=True):
                item[IDENTITY_KEY] = elem

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        """Run the family's processor without our key, then fix K once, for every later use."""
        specs, clean = _split_specs(hf_kwargs)
        info: Any = self.info  # type: ignore[attr-defined]
        if self.serving is not None and "video" in mm_items:
            clean = info.resolve_video_kwargs(clean)
        try:
            data = super()._apply_hf_processor_main(mm_items, clean)  # type: ignore[misc]
        except ValueError as error:
            # vLLM's message prints every pixel; its cause says what was wrong.
            if self.serving is None or error.__cause__ is None:
                raise
            raise ValueError(f"the model's processor refused a video or image: {error.__cause__}") from error
        if self.serving is not None and (layouts := self.video_layouts(data, mm_items.get("video"))):
            for layout in layouts:
                info.video_limit.check(layout.grid)
            pairs = zip(layouts, specs, strict=True)
            kept = [num_retained_tokens(layout.grid.num_tokens, spec.retention_ratio) for layout, spec in pairs]
            data[LAYOUT_KEY] = [layout.to_tensor() for layout in layouts]
            data[NUM_RETAINED_KEY] = torch.tensor(kept, dtype=torch.int64)
            known = self.serving.methods
            data[METHOD_INDEX_KEY] = torch.tensor([known.index(s.method) for s in specs], dtype=torch.int64)
            algorithm = info.ctx.get_mm_config().mm_hasher_algorithm
            data[CELLS_KEY] = [
                torch.zeros(layout.grid.t, 4, dtype=torch.int64) if pixels is None else cell_keys(pixels, algorithm)
                for layout, pixels in zip(layouts, self.video_pixels(data, layouts), strict=True)
            ]
            data[TICKET_KEY] = torch.tensor([draw_ticket() for _ in specs], dtype=torch.int64)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        _, clean = _split_specs(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, clean))  # type: ignore[misc]
        if self.serving is not None:
            for key in FIELDS:
                fields[key] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        specs, clean = _split_specs(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, clean, out_mm_kwargs)  # type: ignore[misc]
        if self.serving is None:
            return updates

        def placeholders(item_idx: int) -> _CompressedPlaceholder:
            item = out_mm_kwargs["video"][item_idx]
            layout = VideoLayout.from_tensor(item[LAYOUT_KEY].data)
            kept = int(item[NUM_RETAINED_KEY].data)
            ticket = int(item[TICKET_KEY].data) if "pixel_values_videos" in item else None
            spec, structure = specs[item_idx], layout.structure_tokens
            report = VideoReport(layout.grid, kept, spec, layout.extent, structure, ticket=ticket)
            # Which vision rows stand between the structure rows is known only after the tower: the ids of the span are
            # right as a multiset, not in order. Nothing reads them but the embedding, which overwrites them.
            ids = [self._row_token_id if token == LEARNED else int(token) for token in layout.ids]
            return _CompressedPlaceholder(full=ids + [self._row_token_id] * kept, report=report)

        video = PromptReplacement(modality="video", target=[self._video_token_id], replacement=placeholders)
        return [update for update in updates if update.modality != "video"] + [video]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        if self.serving is not None:
            pairs = zip(mm_res.prompt_updates.get("video", ()), mm_res.hashes.get("video", ()), strict=True)
            for index, (updates, digest) in enumerate(pairs):
                # Only here all families have what the loader says: vLLM drops it of those whose processor needs none.
                content, (read, times) = updates[0].content, _read_of(mm_items, index)
                if read is not None:
                    content.report = replace(content.report, read=read, times=times)
                _reports.get().append(replace(content.report, identity=digest))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]


def cell_keys(pixels: torch.Tensor, algorithm: Any) -> torch.Tensor:
    """The identity of each cell of a video.

    Args:
        pixels: [T, ...] as the tower reads them.
        algorithm: of vLLM's hashes.

    Returns:
        [T, 4] int64, a digest of each cell's pixels, their dtype and their shape, which holds the grid.
    """
    digests = [
        MultiModalHasher.hash_kwargs(algorithm, dtype=str(cell.dtype), shape=tuple(cell.shape), pixels=cell)
        for cell in pixels.contiguous()
    ]
    return torch.from_numpy(np.array([np.frombuffer(bytes.fromhex(digest)[:32], np.int64) for digest in digests]))


def resolve_ratios(asked: Any, num_videos: int, default: float) -> tuple[float, ...]:
    """One ratio per video from what a request said.

    Args:
        asked: None, a number, or a list with a number per video.
        num_videos: of the request.
        default: for None.

    Raises:
        RequestFieldError: a number out of range, not a number, or a list of another length.
    """
    if asked is None:
        return (default,) * num_videos
    try:
        if not isinstance(asked, Sequence) or isinstance(asked, str):
            return (check_retention_ratio(asked),) * num_videos
        if len(asked) != num_videos:
            raise ValueError(
                f"{RATIO_KEY} must be one number or a list with one number in (0, 1] per video; "
                f"got {len(asked)} for {num_videos} video(s)"
            )
        return tuple(check_retention_ratio(ratio, f"{RATIO_KEY}[{i}]") for i, ratio in enumerate(asked))
    except (TypeError, ValueError) as error:
        raise RequestFieldError(str(error)) from error


def forget_items(cache: Any, prompt: Any) -> None:
    """Take the items of a refused prompt out of vLLM's processor cache: it would not send them to the engine again.

    Args:
        cache: of the API process; None where there is none.
        prompt: what the processor made.
    """
    if cache is not None and isinstance(prompt, dict):
        for hashes in prompt.get("mm_hashes", {}).values():
            for digest in hashes:
                cache.invalidate(digest)


def _split_specs(kwargs: Mapping[str, Any]) -> tuple[tuple[VideoSpec, ...], dict[str, Any]]:
    """Our key apart from what belongs to the model's own processor."""
    clean = dict(kwargs)
    return clean.pop(SPECS_KEY, ()), clean


def identity_of(value: torch.Tensor) -> str:
    """The digest that an item carries as bytes."""
    return bytes(value.tolist()).decode()


def _read_of(mm_items: Any, index: int) -> tuple[Mapping[str, Any] | None, Sequence[float] | None]:
    """What the loader says it read, and the second of each frame; None for embeddings and for frames that came without
    a loader."""
    metadata = getattr(mm_items["video"], "metadata", None)
    one = metadata[index] if isinstance(metadata, list) else None
    return getattr(one, "read", None), getattr(one, "times", None)
