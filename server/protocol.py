"""What our field looks like on the wire."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from score_vllm.budget import check_retention_ratio

FIELD = "retention_ratio"
METHOD_FIELD = "retention_method"


def parse_retention_ratio(value: Any) -> float | list[float] | None:
    """A number in (0, 1], or a list of such, one per video.

    Raises:
        VLLMValidationError: anything else; becomes a 400 that names the field and the range.
    """
    try:
        if value is None:
            return None
        if isinstance(value, list):
            return [check_retention_ratio(item, f"{FIELD}[{i}]") for i, item in enumerate(value)]
        return check_retention_ratio(value)
    except (TypeError, ValueError) as error:
        hint = "" if isinstance(value, list) else ", or a list with one such number per video"
        raise VLLMValidationError(f"{error}{hint}", parameter=FIELD) from error


_NUMBER = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
RetentionRatio = Annotated[
    float | list[float] | None,
    BeforeValidator(parse_retention_ratio),
    WithJsonSchema({"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER}, {"type": "null"}]}),
]


def parse_retention_method(value: Any) -> str | None:
    """A method's name; which ones are allowed is the server's business, checked with the request.

    Raises:
        VLLMValidationError: not a string.
    """
    if value is None or isinstance(value, str):
        return value
    raise VLLMValidationError(f"retention_method must be the name of a method, got {value!r}", parameter=METHOD_FIELD)


class ScoreChatCompletionRequest(ChatCompletionRequest):
    """vLLM's chat request with our field beside OpenAI's."""

    retention_ratio: RetentionRatio = Field(
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

    @model_validator(mode="after")
    def _refuse_near_misses(self) -> "ScoreChatCompletionRequest":
        """vLLM ignores unknown fields; a mistyped one of ours would compress by the default in silence."""
        for name in self.model_extra or ():
            if name.lower().replace("-", "_").startswith("retention"):
                raise VLLMValidationError(
                    f"{name!r} is not a field of this API; did you mean {FIELD!r} or {METHOD_FIELD!r}?", parameter=name
                )
        return self
