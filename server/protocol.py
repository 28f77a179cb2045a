"""What our field looks like on the wire."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from score_vllm.budget import check_retention_ratio

FIELD = "retention_ratio"


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


class ScoreChatCompletionRequest(ChatCompletionRequest):
    """vLLM's chat request with our field beside OpenAI's."""

    retention_ratio: RetentionRatio = Field(
        default=None,
        description=(
            "Fraction of each video's visual tokens that reaches the language model, in (0, 1]; "
            "a list gives one per video. Absent: the server's default."
        ),
    )
