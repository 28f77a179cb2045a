"""The helpers of others' clients still work, and the ``score`` object is found where each of them leaves room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

pytest.importorskip("openai")
from .conftest import API_KEY, Server
from .requests_of import ask, check_counts, data_url

RATIO = {"retention_ratio": 0.25}


class Guess(BaseModel):
    """What the model is made to answer with."""

    count: int = Field(ge=0, le=9)


def test_openai_stream(server: Server, clips: dict[str, Path]) -> None:
    """``.stream()`` puts its final completion together from the chunks."""
    messages = ask(data_url(clips["plain"]))
    # To its end: an answer that the limit cuts off is an error in this helper.
    fields: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": 2000, "temperature": 0}
    with server.client().chat.completions.stream(**fields, extra_body=RATIO) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    check_counts(final, 0.25)
    assert final.choices[0].message.content == "".join(deltas) != ""


@pytest.mark.parametrize("stream", [False, True])
def test_openai_parse(stream: bool, server: Server, clips: dict[str, Path]) -> None:
    """``.parse()``, and ``.stream()`` with a type: the answer is one of that type."""
    fields: dict[str, Any] = {
        "model": "demo", "messages": ask(data_url(clips["plain"])), "max_tokens": 48, "temperature": 0,
        "response_format": Guess, "extra_body": RATIO,
    }  # fmt: skip
    completions = server.client().chat.completions
    if stream:
        with completions.stream(**fields) as events:
            final = events.get_final_completion()
    else:
        final = completions.parse(**fields)
    check_counts(final, 0.25)
    assert isinstance(final.choices[0].message.parsed, Guess)


def test_langchain(server: Server, clips: dict[str, Path]) -> None:
    """It keeps fields that it knows; what is made of a response is a method, in which ``score`` is there to be kept."""
    chat_models = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")

    class WithScore(chat_models.ChatOpenAI):
        """As docs/serving.md has it."""

        def _create_chat_result(self, response: Any, generation_info: Any = None) -> Any:
            result = super()._create_chat_result(response, generation_info)
            score = response.get("score") if isinstance(response, dict) else response.score
            for generation in result.generations:
                generation.message.response_metadata["score"] = score
            return result

    options: dict[str, Any] = {
        "model": "demo", "base_url": f"{server.url}/v1", "api_key": API_KEY, "temperature": 0, "max_tokens": 6,
        "max_retries": 0, "extra_body": RATIO,
    }  # fmt: skip
    asked = [messages.HumanMessage(content=ask(data_url(clips["plain"]))[0]["content"])]
    answer = WithScore(**options).invoke(asked)
    assert answer.content
    (video,) = answer.response_metadata["score"]["videos"]
    assert video["retained_tokens"] < video["original_tokens"]
    assert answer.usage_metadata["input_tokens"] > video["retained_tokens"]
    streamed = "".join(chunk.content for chunk in chat_models.ChatOpenAI(**options).stream(asked))
    assert streamed == answer.content


def test_litellm(server: Server, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes fields on that it does not know, in whole answers; in streams it drops them."""
    # Prices of models come with the package; it would ask GitHub for newer ones.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {
        "model": "openai/demo", "api_base": f"{server.url}/v1", "api_key": API_KEY, "temperature": 0, "max_tokens": 6,
        "messages": ask(data_url(clips["plain"])), "extra_body": RATIO, "num_retries": 0,
    }  # fmt: skip
    answer = litellm.completion(**options)
    check_counts(answer, 0.25)
    chunks = list(litellm.completion(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
