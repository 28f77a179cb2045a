"""The requests of the lmms-eval model, against a stub endpoint; with lmms-eval itself where it is installed."""

from __future__ import annotations

import base64
import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from score_vllm.integrations.lmms_eval.manifest import (
    Endpoint,
    EvaluationStopped,
    RequestError,
    chat_body,
    manifest,
    openai_messages,
    video_url,
)
from tests.stub_server import Answer, Stub, completion, compressing, stub_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "a clip.mp4"
    path.write_bytes(b"pixels")
    return path


def user_turn(url: Any, **fields: Any) -> list[dict[str, Any]]:
    video = {"type": "video", "url": url, **fields}
    return [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]


def test_a_video_is_one_part(clip: Path) -> None:
    (message,) = openai_messages(user_turn(str(clip)), "file")
    assert message == {
        "role": "user",
        "content": [
            {"type": "video_url", "video_url": {"url": clip.as_uri()}},
            {"type": "text", "text": "What happens?"},
        ],
    }
    (message,) = openai_messages(user_turn(str(clip)), "base64")
    assert base64.b64decode(message["content"][0]["video_url"]["url"].partition(",")[2]) == b"pixels"
    assert video_url("https://host/v.mp4", "base64") == "https://host/v.mp4"


def test_what_cannot_be_sent_is_refused(clip: Path, tmp_path: Path) -> None:
    for messages, message in (
        (user_turn(str(tmp_path / "none.mp4")), "is not there"),
        (user_turn(str(clip), start_time=1.0), "a part of a video"),
        (user_turn(object()), "a video as object"),
        ([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}], "the task sends image"),
    ):
        with pytest.raises(RequestError, match=message):
            openai_messages(messages, "file")
    with pytest.raises(ValueError, match="send must be 'file' or 'base64', got 'frames'"):
        video_url(str(clip), "frames")


def test_body() -> None:
    generation = {
        "max_new_tokens": 8,
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
        "until": ["x"],
    }
    assert chat_body("m", [], 0.1, "evs", generation) == {
        "model": "m",
        "messages": [],
        "max_tokens": 8,
        "temperature": 0,
        "top_p": 1.0,
        "retention_ratio": 0.1,
        "retention_method": "evs",
    }
    assert set(chat_body("m", [], None, None, {})) == {"model", "messages", "max_tokens", "temperature"}
    with pytest.raises(RequestError, match="num_beams must be 1, got 4"):
        chat_body("m", [], None, None, {"num_beams": 4})
    with pytest.raises(ValueError, match="retention_ratio must be a number in"):
        chat_body("m", [], 2.0, None, {})


def test_endpoint_sends_the_ratio_and_retries(stub: Stub) -> None:
    seen: list[int] = []

    def reply(body: dict[str, Any]) -> Answer:
        seen.append(1)
        return (503, b"busy") if len(seen) < 3 else compressing(body)

    stub.reply = reply
    endpoint = Endpoint(stub.url, "secret", timeout=10, retries=2, first_wait=0.001)
    answer = endpoint.chat(chat_body("m", [], 0.25, None, {}))
    assert answer["usage"]["prompt_tokens"] == 270
    assert [body["retention_ratio"] for body in stub.bodies] == [0.25] * 3
    assert stub.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("answer", "message", "tries"),
    [
        ((400, {"error": {"message": "no"}}), "HTTP 400", 1),
        ((500, b"boom"), r"HTTP 500: boom \(after 2 tries\)", 2),
        ((200, b"<html>"), "not a chat completion", 1),
        ((200, {"choices": [{"message": {"content": None}}]}), "not a chat completion with text", 1),
    ],
)
def test_a_failed_request_raises(answer: Answer, message: str, tries: int, stub: Stub) -> None:
    stub.reply = lambda _: answer
    with pytest.raises(RequestError, match=message):
        Endpoint(stub.url, None, timeout=10, retries=1, first_wait=0.001).chat({})
    assert len(stub.bodies) == tries


def test_a_server_that_ignores_the_ratio_is_found_out(stub: Stub) -> None:
    endpoint = Endpoint(stub.url, None, timeout=10, retries=0)
    endpoint.verify(chat_body("m", [], 0.25, None, {}))
    endpoint.verify(chat_body("m", [], 0.25, None, {}))
    assert [body["retention_ratio"] for body in stub.bodies] == [0.25, 1.0], "looked at once"
    stub.reply = lambda _: completion(prompt_tokens=1000)
    with pytest.raises(RequestError, match=r"the server ignores .*: 1000 prompt tokens at 0\.25, 1000 at 1"):
        Endpoint(stub.url, None, timeout=10, retries=0).verify(chat_body("m", [], 0.25, None, {}))


def test_the_entry_point_is_declared_and_loads() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (value,) = groups["lmms_eval.models"].values()
    assert importlib.metadata.EntryPoint("score_vllm", value, "lmms_eval.models").load() is manifest


def test_stopping_is_not_an_exception_that_lmms_eval_swallows() -> None:
    assert not issubclass(EvaluationStopped, Exception)


def make_request(messages: list[dict[str, Any]], doc_id: int) -> SimpleNamespace:
    return SimpleNamespace(args=("", lambda _: messages, {"max_new_tokens": 4}, doc_id, "task", "test"))


def model_class() -> Any:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; docs/evaluating.md says how")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    return registry.get_model_class("score_vllm")


def test_lmms_eval_drives_it(stub: Stub, clip: Path) -> None:
    model = model_class()(base_url=stub.url, model="m", retention_ratio=0.25, batch_size="1", device=None)
    model.task_dict = {"task": {"test": [None, None]}}
    stub.reply = lambda body: completion(text="B", prompt_tokens=compressing(body)[1]["usage"]["prompt_tokens"])
    answers = model.generate_until([make_request(user_turn(str(clip)), i) for i in range(2)])
    assert [(a.text, a.token_counts.input_tokens) for a in answers] == [("B", 270)] * 2
    assert len(stub.bodies) == 4, "two to verify, two questions"


def test_lmms_eval_gets_no_text_for_a_failure(stub: Stub, clip: Path) -> None:
    model = model_class()(base_url=stub.url, retention_ratio=1, max_retries=0)
    model.task_dict = {"task": {"test": [None, None]}}
    stub.reply = lambda _: (400, {"error": {"message": "too long"}})
    with pytest.raises(EvaluationStopped, match=r"task task, document 0: HTTP 400.*no score is given"):
        model.generate_until([make_request(user_turn(str(clip)), 0)])


@pytest.mark.parametrize(
    "arguments", [{"retention": 0.1}, {"retention_ratio": 0}, {"send": "frames"}, {"max_retries": -1}]
)
def test_lmms_eval_wrong_arguments_stop_it(arguments: dict[str, Any]) -> None:
    with pytest.raises(EvaluationStopped, match="error: --model_args of score_vllm"):
        model_class()(**arguments)
