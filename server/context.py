"""What travels with one request from its route down to the renderer and back."""

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any

from vllm.exceptions import VLLMValidationError

from score_vllm.config import ServingConfig
from score_vllm.models.cell_records import EncodedCellsReader
from score_vllm.models.processing import VideoReport
from score_vllm.models.video_options import VideoOptions, pending_options
from score_vllm.server.content import EXPLAIN_FIELD, OWN_FIELDS, video_parts
from score_vllm.server.protocol import FIELD, METHOD_FIELD, VIDEO_FIELDS, VideoFields


@dataclass(frozen=True, slots=True)
class ServerState:
    """How this server compresses and reads videos.

    Attributes:
        serving: the serving configuration.
        max_frames: most frames that a request may ask for, or None where another loader than ours reads.
        trusts_requests: whether the operator takes ``media_io_kwargs`` from requests.
        encoded: what the workers say of the cells they encoded; None where they leave no files.
        engine_client: vLLM's, of this process.
        playground: whether the page at /playground is served.
    """

    serving: ServingConfig
    max_frames: int | None
    trusts_requests: bool = False
    encoded: EncodedCellsReader | None = None
    engine_client: Any = None
    playground: bool = False


@dataclass
class RequestContext:
    """Of one chat.

    Attributes:
        ratio: ``retention_ratio`` of the request.
        method: ``retention_method`` of the request.
        options: one per video; empty where the request says nothing about any.
        explain: whether the response shows what was kept.
        reports: filled by the renderer, one per video.
        encoded: set where the videos reach the model.
        cells: encoded for each video, as far as it has been asked for.
    """

    ratio: float | list[float] | None
    method: str | None = None
    options: tuple[VideoOptions, ...] = ()
    explain: bool = False
    reports: list[VideoReport] = field(default_factory=list)
    encoded: EncodedCellsReader | None = None
    cells: Counter[int] = field(default_factory=Counter)

    def score(self, serving: ServingConfig) -> dict[str, Any]:
        """The ``score`` object of the response; asked for when a response, or the first token of a stream, is there."""
        return {
            "method": self.method or serving.method,
            "retention_ratio": serving.retention_ratio if self.ratio is None else self.ratio,
            "videos": [report.to_json() | self._cells(index, report) for index, report in enumerate(self.reports)],
        }

    def _cells(self, index: int, report: VideoReport) -> dict[str, int]:
        if self.encoded is None or report.ticket is None:
            return {}
        self.cells[index] += self.encoded.take(report.ticket)
        return {"encoded_cells": self.cells[index], "reused_cells": max(0, report.grid.t - self.cells[index])}


current: ContextVar[RequestContext | None] = ContextVar("score_request", default=None)
# False while a request is served that only renders a prompt: its videos reach no language model.
counts: ContextVar[bool] = ContextVar("score_counts", default=True)


def enter(request: VideoFields, state: ServerState | None) -> RequestContext:
    """Check our fields against the server and the videos of the request, and make them known to what renders it.

    Raises:
        VLLMValidationError: a field that this server does not know, or a list of another length than the videos.
    """
    given = [name for name in OWN_FIELDS if getattr(request, name, None) is not None]
    if state is None:
        if given:
            text = f"{given[0]} was given, but this server runs without SCORE"
            raise VLLMValidationError(text, parameter=given[0])
        return RequestContext(None)
    serving = state.serving
    if request.retention_method not in (None, *serving.methods):
        raise VLLMValidationError(
            f"{METHOD_FIELD} must be one of {list(serving.methods)} on this server, "
            f"got {brief(request.retention_method)}",
            parameter=METHOD_FIELD,
        )
    if getattr(request, "media_io_kwargs", None) and not state.trusts_requests and state.max_frames is not None:
        raise VLLMValidationError(
            f"media_io_kwargs is not taken from requests on this server; {', '.join(VIDEO_FIELDS)} say what to read",
            parameter="media_io_kwargs",
        )
    videos = video_parts(request.messages)  # type: ignore[attr-defined]
    for name in given:
        value = getattr(request, name)
        if isinstance(value, list) and len(value) != len(videos):
            kind = "one number in (0, 1]" if name == FIELD else "one value"
            raise VLLMValidationError(
                f"{name} has {len(value)} entries, but the request has {len(videos)} video(s); give {kind} per video, "
                "or one for all",
                parameter=name,
            )
    options: tuple[VideoOptions, ...] = ()
    if asked := [name for name in given if name in VIDEO_FIELDS]:
        if state.max_frames is None:
            text = f"{asked[0]} needs score-serve --video-loader pyav or decord, which this server does not use"
            raise VLLMValidationError(text, parameter=asked[0])
        if any(video.is_embedding for video in videos):
            raise VLLMValidationError(f"{asked[0]} was given, but video_embeds are read already", parameter=asked[0])
        options = tuple(request.options_of(index) for index in range(len(videos)))
        for index, option in enumerate(options):
            _check(option, state.max_frames, f" of video {index}" if len(videos) > 1 else "")
    explain = bool(getattr(request, EXPLAIN_FIELD, None))
    context = RequestContext(request.retention_ratio, request.retention_method, options, explain)
    # Each request has a context of its own.
    current.set(context)
    fetched = [option for option, video in zip(options, videos, strict=False) if video.has_url]
    pending_options.set(iter(fetched))
    return context


def _check(option: VideoOptions, max_frames: int, which: str) -> None:
    if option.max_frames is not None and option.max_frames > max_frames:
        raise VLLMValidationError(
            f"video_max_frames{which} must be an integer in [1, {max_frames}] on this server (--max-frames), "
            f"got {brief(option.max_frames)}",
            parameter="video_max_frames",
        )
    if option.end is not None and option.end <= (option.start or 0.0):
        raise VLLMValidationError(
            f"video_end{which} must be above video_start = {option.start or 0.0:g}, got {option.end:g}",
            parameter="video_end",
        )
