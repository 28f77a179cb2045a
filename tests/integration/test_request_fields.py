"""What a request may say, before any engine: fields, content parts, and routes that take neither."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError

from score_vllm.config import ServingConfig
from score_vllm.models.video_options import VideoOptions, pending_options
from score_vllm.server import context, protocol
from score_vllm.server.content import has_video, standard_messages, video_parts
from score_vllm.server.other_routes import RefuseElsewhere

URL = "https://example.org/a.mp4"


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]}]


def request(*parts: Any, **fields: Any) -> protocol.ScoreChatCompletionRequest:
    return protocol.ScoreChatCompletionRequest(model="demo", messages=message(*parts), **fields)


VIDEO = {"type": "video_url", "video_url": {"url": URL}}
STATE = context.ServerState(ServingConfig(0.1, "uniform"), 128)


@pytest.mark.parametrize(
    "part",
    [
        VIDEO,
        {"type": "video_url", "video_url": URL},
        {"video_url": URL},
        {"video_url": {"url": URL}},
        {"type": "video", "video": URL},
        {"type": "video", "video": {"url": URL}},
        {"type": "video", "video_url": {"url": URL}},
        {"type": "video", "url": URL},
        {"type": "input_video", "video_url": URL},
        {"type": "input_video", "input_video": {"url": URL}},
    ],
)
def test_forms_that_clients_write(part: dict[str, Any]) -> None:
    parsed = request(part)
    content = parsed.messages[0]["content"]  # type: ignore[index, typeddict-item]
    assert next(iter(content)) == VIDEO
    assert [video.has_url for video in video_parts(parsed.messages)] == [True]


def test_base64_as_input_audio_has_it() -> None:
    (part, _) = standard_messages(message({"type": "input_video", "input_video": {"data": "AAAA", "format": "webm"}}))[
        0
    ]["content"]
    assert part["video_url"]["url"] == "data:video/webm;base64,AAAA"


def test_a_video_by_its_uuid_alone() -> None:
    part = {"type": "video_url", "video_url": None, "uuid": "a"}
    assert standard_messages(message(part))[0]["content"][0] == part
    assert [video.has_url for video in video_parts(message(part))] == [False]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "video_url", "video_url": {"uri": URL}}, '"type": "video_url"'),
        ({"type": "video_url", "video_url": ""}, '"type": "video_url"'),
        ({"type": "video_url"}, '"type": "video_url"'),
        ({"type": "video", "video": 5}, '"type": "video_url"'),
        ({"type": "video", "video": ["a.jpg", "b.jpg"]}, "data:video/jpeg;base64,"),
        ({"type": "video", "video": URL, "fps": 1}, "'video_fps' at the top level"),
        ({"type": "video", "video": URL, "nframes": 8}, "'video_max_frames' at the top level"),
        ({**VIDEO, "video_start": 3}, "'video_start' at the top level"),
        (
            {"type": "video_url", "video_url": {"url": URL, "retention_ratio": 0.5}},
            "'retention_ratio' at the top level",
        ),
        ({"type": "image_url", "image_url": {"url": "data:video/mp4;base64,AAAA"}}, "image_url holds a video"),
        ({"type": "image_url", "image_url": {"url": URL + "?x=1.png"}}, "image_url holds a video"),
        ({"type": "input_image", "image_url": "file:///a/b.MOV"}, "image_url holds a video"),
    ],
)
def test_forms_that_are_refused_with_a_hint(part: dict[str, Any], said: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        request(part)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        None,
        [5],
        [{"role": "user", "content": "Hello"}],
        [
            {
                "role": "user",
                "content": ["Hello", {"type": "image_url", "image_url": {"url": "https://a/b.png?c=d.mp4"}}],
            }
        ],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,a.mp4"}}]}],
    ],
)
def test_what_is_no_video_stays_as_it_is(messages: Any) -> None:
    assert standard_messages(messages) == messages
    assert video_parts(messages) == []


@pytest.mark.parametrize(
    ("field", "bad", "allowed"),
    [
        ("video_start", -1, "[0, 604800]"),
        ("video_start", "3", "[0, 604800]"),
        ("video_start", True, "[0, 604800]"),
        ("video_start", float("nan"), "[0, 604800]"),
        ("video_end", float("inf"), "[0, 604800]"),
        ("video_end", [1, -2], "[0, 604800]"),
        ("video_fps", 0, "(0, 240]"),
        ("video_fps", 241, "(0, 240]"),
        ("video_fps", {"a": 1}, "(0, 240]"),
        ("video_max_frames", 0, ">= 1"),
        ("video_max_frames", 1.5, ">= 1"),
        ("video_max_frames", [4, "x"], ">= 1"),
    ],
)
def test_a_value_out_of_range_names_field_value_and_range(field: str, bad: Any, allowed: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        request(VIDEO, **{field: bad})
    assert caught.value.parameter == field
    text = str(caught.value)
    assert field in text
    assert allowed in text
    assert repr(bad[-1] if isinstance(bad, list) else bad) in text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fps", "video_fps"),
        ("videoStart", "video_start"),
        ("VideoStart", "video_start"),
        ("VIDEO_END", "video_end"),
        ("RetentionRatio", "retention_ratio"),
        ("video-end", "video_end"),
        ("video_stop", "video_end"),
        ("video_window", "video_end"),
        ("max_frames", "video_max_frames"),
        ("num_frames", "video_max_frames"),
        ("retentionRatio", "retention_ratio"),
        ("ratio", "retention_ratio"),
        ("method", "retention_method"),
    ],
)
def test_unknown_fields_that_were_meant_as_ours(name: str, meant: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"did you mean '{meant}'"):
        request(VIDEO, **{name: 1})


@pytest.mark.parametrize("field", [protocol.FIELD, protocol.METHOD_FIELD, *protocol.VIDEO_FIELDS])
@pytest.mark.parametrize("value", ["x" * 5000, 10**400, [1] * 5000 + ["x"]])
def test_a_long_value_is_not_sent_back_whole(field: str, value: Any) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        run(VIDEO, **{field: value})
    assert field in str(caught.value)
    assert len(str(caught.value)) < 300


def test_extra_body_in_the_json() -> None:
    for kind in (protocol.ScoreChatCompletionRequest, protocol.ScoreTokenizeChatRequest):
        with pytest.raises(VLLMValidationError, match="write retention_ratio, video_fps at the top level"):
            kind(model="demo", messages=message(VIDEO), extra_body={"video_fps": 1, "retention_ratio": 0.5})


def run(*parts: Any, state: context.ServerState | None = STATE, **fields: Any) -> tuple[Any, list[VideoOptions]]:
    """``enter`` as a route calls it, in a context of its own; its result and what the fetches would get."""

    async def inner() -> tuple[Any, list[VideoOptions]]:
        entered = context.enter(request(*parts, **fields), state)
        return entered, list(pending_options.get() or ())

    return asyncio.run(inner())


def test_one_value_is_for_all_videos_and_a_list_for_each() -> None:
    entered, fetched = run(VIDEO, VIDEO, video_start=[1, None], video_fps=4, video_max_frames=[None, 8.0])
    assert entered.options == (VideoOptions(1.0, None, 4.0, None), VideoOptions(None, None, 4.0, 8))
    assert fetched == list(entered.options)


def test_a_video_that_is_not_fetched_takes_no_options_from_the_next() -> None:
    cached = {"type": "video_url", "video_url": None, "uuid": "a"}
    entered, fetched = run(cached, VIDEO, video_start=[1, 2])
    assert [option.start for option in entered.options] == [1, 2]
    assert [option.start for option in fetched] == [2]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"video_max_frames": 129}, "video_max_frames", "[1, 128]"),
        ({"video_start": 5, "video_end": 5}, "video_end", "above video_start = 5"),
        ({"video_end": 0}, "video_end", "above video_start = 0"),
        ({"video_fps": [1, 2]}, "video_fps", "2 entries, but the request has 1 video"),
        ({"retention_ratio": []}, "retention_ratio", "0 entries, but the request has 1 video"),
        ({"retention_method": "magic"}, "retention_method", "must be one of ['uniform']"),
    ],
)
def test_what_only_the_server_can_check(fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        run(VIDEO, **fields)
    assert caught.value.parameter == field
    assert said in str(caught.value)


def test_servers_that_cannot_do_it_say_so() -> None:
    with pytest.raises(VLLMValidationError, match="video_fps was given, but this server runs without SCORE"):
        run(VIDEO, video_fps=1, state=None)
    other_loader = context.ServerState(STATE.serving, None)
    with pytest.raises(VLLMValidationError, match="--video-loader pyav"):
        run(VIDEO, video_fps=1, state=other_loader)
    assert run(VIDEO, retention_ratio=0.5, state=other_loader)[1] == []


def test_equal_options_have_one_cache_key() -> None:
    assert VideoOptions().cache_key() == ""
    assert VideoOptions(start=1, max_frames=8).cache_key() == VideoOptions(start=1.0, max_frames=8).cache_key()
    keys = {VideoOptions(*values).cache_key() for values in ((1,), (None, 1), (None, None, 1), (None, None, None, 1))}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": [{"type": "input_video", "video_url": "x"}]}],
        [{"role": "user", "content": [{"type": "video", "source": {"type": "base64", "media_type": "video/mp4"}}]}],
        [{"role": "user", "content": [{"type": "input_file", "file_data": "data:video/mp4;base64,AA"}]}],
        [{"content": [{"type": "tool_result", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}],
    ],
)
def test_videos_in_the_forms_of_other_apis(value: Any) -> None:
    assert has_video(value)
    assert not has_video([{"role": "user", "content": [{"type": "text", "text": "a video of data:video/mp4"}]}])


def ask_middleware(path: str, body: Any) -> tuple[int, str]:
    """Status and message; 299 where the next application was reached with the whole body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got = b""
        while True:
            part = await receive()
            got += part["body"]
            if not part.get("more_body"):
                break
        assert got == raw
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def inner() -> None:
        pieces = [raw[i : i + 7] for i in range(0, len(raw), 7)]
        parts = iter([{"type": "http.request", "body": p, "more_body": True} for p in pieces])

        async def receive() -> Any:
            return next(parts, {"type": "http.request", "body": b"", "more_body": False})

        async def send(part: Any) -> None:
            sent.append(part)

        scope = {"type": "http", "method": "POST", "path": path, "root_path": ""}
        await RefuseElsewhere(app, frozenset({path}))(scope, receive, send)

    asyncio.run(inner())
    answer = json.loads(b"".join(part["body"] for part in sent[1:]))
    return sent[0]["status"], answer.get("error", {}).get("message", "")


@pytest.mark.parametrize("field", protocol.OWN_FIELDS)
def test_routes_without_our_fields(field: str) -> None:
    for path in ("/v1/responses", "/v1/completions", "/v1/messages"):
        for body in ({field: 1}, {"extra_body": {field: 1}}):
            status, said = ask_middleware(path, body)
            assert status == 400
            routes = "/v1/chat/completions" if field == "score_explain" else "/v1/chat/completions and /tokenize"
            assert f"{field} is supported on {routes} only, not on {path}" in said


def test_routes_without_videos() -> None:
    video = [{"role": "user", "content": [{"type": "input_video", "video_url": "https://a/b.mp4"}]}]
    for path, key in {"/v1/responses": "input", "/v1/messages": "messages"}.items():
        status, said = ask_middleware(path, {key: video, "max_tokens": 4})
        assert (status, said.split(" (")[0]) == (400, f"videos are supported on /v1/chat/completions, not on {path}")
        assert ask_middleware(path, {key: "a video of it", "tools": [{"type": "video"}]})[0] == 299
    assert ask_middleware("/v1/completions", {"prompt": "video_url"})[0] == 299
    assert ask_middleware("/v1/responses", b'{"input": "video')[0] == 299, "broken JSON is vLLM's to refuse"


def test_a_medium_that_cannot_be_had_has_status_field_and_when_to_ask_again() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from score_vllm.models.media_error import MediaError
    from score_vllm.server.endpoints import ScoreEndpointPlugin

    app = FastAPI()
    ScoreEndpointPlugin().attach_router(app)

    @app.get("/{status}")
    async def fail(status: int) -> None:
        raise MediaError("busy", HTTPStatus(status), "video_url", 7 if status == 503 else None)

    client = TestClient(app)
    for status, after in ((503, "7"), (504, None), (502, None)):
        answer = client.get(f"/{status}")
        assert answer.status_code == status
        assert answer.headers.get("Retry-After") == after
        error = answer.json()["error"]
        assert (error["message"], error["code"], error["param"]) == ("busy", status, "video_url")


def test_options_of_the_loader_are_not_taken_from_requests() -> None:
    with pytest.raises(VLLMValidationError, match="video_start, video_end, video_fps, video_max_frames say"):
        run(VIDEO, media_io_kwargs={"video": {"fps": 1}})
    trusting = context.ServerState(STATE.serving, 128, trusts_requests=True)
    run(VIDEO, media_io_kwargs={"video": {"fps": 1}}, state=trusting)
