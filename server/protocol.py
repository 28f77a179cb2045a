"""What our fields look like on the wire, in requests and in responses."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import core_schema
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeResponse
from vllm.exceptions import VLLMValidationError

from score_vllm.budget import check_retention_ratio
from score_vllm.models.video_options import VideoOptions
from score_vllm.server.content import ALIASES, EXPLAIN_FIELD, OWN_FIELDS, standard_messages
from score_vllm.video.sampling import MAX_FPS

FIELD = "retention_ratio"
METHOD_FIELD = "retention_method"
VIDEO_FIELDS = tuple(f"video_{name}" for name in VideoOptions.__dataclass_fields__)
MAX_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class PerVideo:
    """Annotation of a field with one value for all videos, or a list with one per video.

    Attributes:
        name: of the field.
        check: takes a value and its name, gives the value as it is kept; raises TypeError or ValueError.
        schema: of one value, for OpenAPI.
        holes: whether an entry of a list may be null, for the server's default.
    """

    name: str
    check: Callable[[Any, str], Any]
    schema: dict[str, Any]
    holes: bool = True

    def parse(self, value: Any) -> Any:
        """The value as it is kept.

        Raises:
            VLLMValidationError: becomes a 400 that names the field, the value and the range.
        """
        try:
            if isinstance(value, list):
                return [
                    None if item is None and self.holes else self.check(item, f"{self.name}[{i}]")
                    for i, item in enumerate(value)
                ]
            return None if value is None else self.check(value, self.name)
        except (TypeError, ValueError) as error:
            hint = "" if isinstance(value, list) else ", or a list with one such number per video"
            raise VLLMValidationError(f"{error}{hint}", parameter=self.name) from error

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """This class alone parses the field."""
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """A value, a list of them, or null."""
        item = {"anyOf": [self.schema, {"type": "null"}]} if self.holes else self.schema
        return {"anyOf": [self.schema, {"type": "array", "items": item}, {"type": "null"}]}


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"{name} must be a number of seconds in [0, {MAX_SECONDS}], got {brief(value)}")
    return float(value)


def _rate(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FPS:
        raise ValueError(f"{name} must be a number of frames per second in (0, {MAX_FPS}], got {brief(value)}")
    return float(value)


def _count(value: Any, name: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not value >= 1:
        raise ValueError(f"{name} must be an integer >= 1, got {brief(value)}")
    return int(value)


_RATIO = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_SECONDS = {"type": "number", "minimum": 0, "maximum": MAX_SECONDS}
_RATE = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_FPS}
_COUNT = {"type": "integer", "minimum": 1}


def parse_retention_method(value: Any) -> str | None:
    """A method's name; which ones are allowed is the server's business, checked with the request.

    Raises:
        VLLMValidationError: not a string.
    """
    if value is None or isinstance(value, str):
        return value
    raise VLLMValidationError(
        f"retention_method must be the name of a method, got {brief(value)}", parameter=METHOD_FIELD
    )


def parse_explain(value: Any) -> bool | None:
    """A switch.

    Raises:
        VLLMValidationError: neither true nor false.
    """
    if value is None or isinstance(value, bool):
        return value
    raise VLLMValidationError(f"{EXPLAIN_FIELD} must be true or false, got {brief(value)}", parameter=EXPLAIN_FIELD)


class VideoFields(BaseModel):
    """Our fields beside those of vLLM's request."""

    retention_ratio: Annotated[
        float | list[float] | None, PerVideo(FIELD, check_retention_ratio, _RATIO, holes=False)
    ] = Field(
        default=None,
        description=(
            "Fraction of each video's visual tokens that reaches the language model, in (0, 1]; "
            "a list gives one per video. Absent: the server's default."
        ),
    )
    retention_method: Annotated[str | None, BeforeValidator(parse_retention_method)] = Field(
        default=None,
        description="Selection method, among those that the operator allows. Absent: the server's default.",
    )
    video_start: Annotated[float | list[float | None] | None, PerVideo("video_start", _seconds, _SECONDS)] = Field(
        default=None,
        description="Second of the source at which reading begins; a list gives one per video. Absent: 0.",
    )
    video_end: Annotated[float | list[float | None] | None, PerVideo("video_end", _seconds, _SECONDS)] = Field(
        default=None,
        description="Second of the source at which reading ends; a list gives one per video. Absent: its end.",
    )
    video_fps: Annotated[float | list[float | None] | None, PerVideo("video_fps", _rate, _RATE)] = Field(
        default=None,
        description=(
            "Frames per second to read, as far as the most frames allow; of a JPEG sequence, the rate it was taken "
            "at. A list gives one per video. Absent: the server's default."
        ),
    )
    video_max_frames: Annotated[int | list[int | None] | None, PerVideo("video_max_frames", _count, _COUNT)] = Field(
        default=None,
        description="Most frames to read, up to the server's own limit; a list gives one per video.",
    )

    @model_validator(mode="before")
    @classmethod
    def _standard_content(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if isinstance(nested := data.get("extra_body"), dict):
                names = ", ".join(sorted(nested)) or "its keys"
                raise VLLMValidationError(
                    f"extra_body is an argument of OpenAI's Python client, not a field of the request: write {names} "
                    "at the top level of the JSON",
                    parameter="extra_body",
                )
            if "messages" in data:
                return {**data, "messages": standard_messages(data["messages"])}
        return data

    @model_validator(mode="after")
    def _refuse_near_misses(self) -> "VideoFields":
        """vLLM ignores unknown fields; a mistyped one of ours would compress by the default in silence."""
        for name in self.model_extra or ():
            if name == EXPLAIN_FIELD:
                text = f"{name} is a field of chat completions alone: nothing is selected before a question is answered"
                raise VLLMValidationError(text, parameter=name)
            if (close := near_miss(name)) is not None:
                raise VLLMValidationError(
                    f"{name!r} is not a field of this API; did you mean {close!r}?", parameter=name
                )
        return self

    def options_of(self, index: int) -> VideoOptions:
        """What the request says about its video of that index."""
        return VideoOptions(
            *(_item(getattr(self, f"video_{name}"), index) for name in VideoOptions.__dataclass_fields__)
        )


def _item(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list) else value


def near_miss(name: str) -> str | None:
    """Which of our fields an unknown one was probably meant to be."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    if (bare := plain.removeprefix("video_")) in ALIASES:
        return ALIASES[bare]
    if plain.startswith("score_") or plain == "explain":
        return EXPLAIN_FIELD
    if plain.startswith(("retention", "video_")):
        return difflib.get_close_matches(plain, OWN_FIELDS, n=1, cutoff=0.0)[0]
    return None


class ScoreChatCompletionRequest(VideoFields, ChatCompletionRequest):
    """vLLM's chat request with our fields beside OpenAI's."""

    score_explain: Annotated[bool | None, BeforeValidator(parse_explain)] = Field(
        default=None,
        description="Whether score.videos says which tokens were kept: cell_seconds, kept_per_cell, kept_mask.",
    )


class ScoreTokenizeChatRequest(VideoFields, TokenizeChatRequest):
    """vLLM's request to count a chat's tokens, with the fields that decide how many a video has."""


class VideoScore(BaseModel):
    """What was read of one video, and how many of its tokens reached the language model.

    The fields of reading are absent where the frames did not come from score-vllm's own loaders.
    """

    model_config = ConfigDict(extra="allow")

    grid: tuple[int, int, int] = Field(description="Temporal cells, rows and columns of visual tokens.")
    original_tokens: int
    retained_tokens: int
    structure_tokens: int = Field(description="Tokens of the video's span that are no visual tokens, all kept.")
    retention_ratio: float
    encoded_cells: int | None = Field(
        default=None, description="Temporal cells that the vision tower encoded for this video. Not of a token count."
    )
    reused_cells: int | None = Field(
        default=None, description="Temporal cells whose output was there already; with the encoded ones `grid[0]`."
    )
    duration: float | None = Field(default=None, description="Seconds of the source.")
    window: tuple[float, float] | None = Field(default=None, description="Seconds of the source that were read.")
    frames: int | None = Field(default=None, description="Frames read.")
    first: float | None = Field(default=None, description="Second of the first frame.")
    last: float | None = Field(default=None, description="Second of the last frame.")
    step: float | None = Field(default=None, description="Mean seconds from one frame to the next.")
    source_frames: int | None = Field(default=None, description="Pictures that the source shows.")
    source_fps: float | None = Field(default=None, description="Mean pictures a second of the source.")
    source_size: tuple[int, int] | None = Field(default=None, description="Width and height, before scaling.")
    warnings: list[str] | None = Field(default=None, description="What was repaired, skipped or fitted.")
    # With score_explain only.
    cell_seconds: list[float] | None = Field(
        default=None, description="Second of the first frame of each cell; null where the frames came without times."
    )
    kept_per_cell: list[int] | None = Field(default=None, description="Kept tokens of each temporal cell.")
    kept_mask: str | None = Field(
        default=None,
        description=(
            "Base64 of one bit per visual token, 1 where it was kept, in the order of cells, rows, columns; the first "
            "is the highest bit of the first byte."
        ),
    )
    kept_missing: str | None = Field(default=None, description="Why kept_per_cell and kept_mask are null.")


class ScoreReport(BaseModel):
    """How the videos of one request were compressed."""

    method: str
    retention_ratio: float | list[float]
    videos: list[VideoScore]


class ScoreChatCompletionResponse(ChatCompletionResponse):
    """vLLM's chat response with our report."""

    score: ScoreReport


class ScoreTokenizeResponse(TokenizeResponse):
    """vLLM's token count with our report, which a plain prompt has not."""

    score: ScoreReport | None = None
