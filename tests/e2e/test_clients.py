"""The helpers of others' clients still work, and the ``score`` object is found where each of them leaves room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from score_vllm import num_retained_tokens
from tests.pages import BLOCK

pytest.importorskip("openai")
from .conftest import API_KEY, ROOT, Server
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
        "model": "demo", "messages": ask(data_url(clips["plain"])), "max_tokens": 400, "temperature": 0,
        # The grammar allows white space without end, and so small a model may go on with it.
        "frequency_penalty": 2, "response_format": Guess, "extra_body": RATIO,
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
    """The class on the page about serving keeps what LangChain's own drops."""
    pytest.importorskip("langchain_openai")
    (code,) = (
        m["code"] for m in BLOCK.finditer((ROOT / "docs" / "serving.md").read_text()) if "langchain" in m["code"]
    )
    made: dict[str, Any] = {}
    exec(code.partition("model =")[0], made)
    model = made["ScoreChatOpenAI"](
        model="demo", base_url=f"{server.url}/v1", api_key=API_KEY, temperature=0, max_tokens=6, max_retries=0,
        extra_body=RATIO,
    )  # fmt: skip
    asked = ask(data_url(clips["plain"]))
    answer = model.invoke(asked)
    (video,) = answer.response_metadata["score"]["videos"]
    assert video["retained_tokens"] == num_retained_tokens(video["original_tokens"], 0.25)
    assert answer.usage_metadata["input_tokens"] > video["retained_tokens"]
    chunks = list(model.stream(asked))
    assert "".join(chunk.content for chunk in chunks) == answer.content != ""
    scores = [chunk.response_metadata["score"] for chunk in chunks if "score" in chunk.response_metadata]
    assert [score["videos"][0]["retained_tokens"] for score in scores] == [video["retained_tokens"]] * 2


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
