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

from score_vllm.client import RequestFailed
from score_vllm.integrations.lmms_eval.manifest import (
    EvaluationStopped,
    chat_body,
    manifest,
    openai_messages,
    video_url,
)
from tests.stub_server import Stub, completion, compressing, stub_server

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
        (user_turn(str(tmp_path / "none.mp4")), "no such file"),
        (user_turn(str(clip), start_time=1.0), "a part of a video"),
        (user_turn(object()), "a video as object"),
        ([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}], "the task sends image"),
    ):
        with pytest.raises(RequestFailed, match=message):
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
    with pytest.raises(RequestFailed, match="num_beams must be 1, got 4"):
        chat_body("m", [], None, None, {"num_beams": 4})
    with pytest.raises(ValueError, match="retention_ratio must be a number in"):
        chat_body("m", [], 2.0, None, {})


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
