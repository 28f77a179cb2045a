"""score-serve as its users see it: the OpenAI client, real files, bad input."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from score_vllm import num_retained_tokens
from score_vllm.demo import demo_clip, demo_model
from score_vllm.video import decode_video

openai = pytest.importorskip("openai")
from benchmarks.serving.process import free_port  # noqa: E402

from .conftest import API_KEY, ROOT, SERVED, Server  # noqa: E402
from .requests_of import ask, chat, check_counts, data_url, metrics, post  # noqa: E402

RATIOS = (1.0, 0.25, 0.1)
SHARED_VIDEOS = (
    "av1_video.mkv",
    "bt709_full_range.mp4",
    "corrupted.mp4",
    "h265_10bits.mp4",
    "nasa_13013.mp4",
    "unordered.mov",
    "video_90.mov",
)


@pytest.mark.parametrize("name", SHARED_VIDEOS)
def test_every_shared_video(name: str, server: Server, shared_videos: Path) -> None:
    """HTTP 200 with the exact count, and the grid that transformers' own processor gives those frames."""
    import torch
    from transformers import AutoProcessor

    path = shared_videos / name
    decoded = decode_video(path.read_bytes())
    model = demo_model()
    frames = torch.from_numpy(decoded.frames).permute(0, 3, 1, 2)
    grid = AutoProcessor.from_pretrained(model).video_processor([frames], return_tensors="pt")["video_grid_thw"][0]
    prompt_tokens = {}
    for ratio in RATIOS:
        answer = chat(server, ask(data_url(path)), retention_ratio=ratio)
        video = check_counts(answer, ratio)
        assert video["grid"] == [int(grid[0]), int(grid[1]) // 2, int(grid[2]) // 2]
        prompt_tokens[ratio] = answer.usage.prompt_tokens - video["retained_tokens"]
    assert len(set(prompt_tokens.values())) == 1, "only the video's tokens may differ between ratios"


@pytest.mark.parametrize("name", ["plain", "odd", "one_frame", "one_pixel_wide"])
def test_clips_made_here(name: str, server: Server, clips: dict[str, Path]) -> None:
    for ratio in RATIOS:
        check_counts(chat(server, ask(data_url(clips[name])), retention_ratio=ratio), ratio)


def test_readme_example(server: Server, tmp_path: Path) -> None:
    """The README's client code, as printed, gives what is printed below it."""
    readme = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI(" in block)
    shown = re.search(r"```\n([^`]*\n\d+ -> \d+)\n```", readme)
    assert shown is not None
    shutil.copy(demo_clip(), tmp_path / "clip.mp4")
    for printed, here in (("http://127.0.0.1:8000", server.url), ('api_key="none"', f'api_key="{API_KEY}"')):
        assert printed in code
        code = code.replace(printed, here)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip() == shown.group(1)


def test_default_ratio_and_file_url(server: Server) -> None:
    answer = chat(server, ask(f"file://{server.media}/plain.mp4"))
    check_counts(answer, 0.1)


def test_one_and_one_point_zero_are_the_same_request(server: Server, clips: dict[str, Path]) -> None:
    answers = [chat(server, ask(data_url(clips["plain"])), retention_ratio=r, max_tokens=8) for r in (1, 1.0)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_one_ratio_per_video(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]), data_url(clips["odd"]))
    answer = chat(server, messages, retention_ratio=[0.5, 0.2])
    assert answer.score["retention_ratio"] == [0.5, 0.2]
    for video, ratio in zip(answer.score["videos"], (0.5, 0.2), strict=True):
        assert video["retention_ratio"] == ratio
        assert video["retained_tokens"] == num_retained_tokens(video["original_tokens"], ratio)
    both = chat(server, messages, retention_ratio=0.3)
    assert [v["retention_ratio"] for v in both.score["videos"]] == [0.3, 0.3]


@pytest.mark.parametrize("method", SERVED)
def test_every_method_over_a_real_video(method: str, server: Server, shared_videos: Path) -> None:
    messages = ask(data_url(shared_videos / "nasa_13013.mp4"))
    for ratio in RATIOS:
        answer = chat(server, messages, retention_ratio=ratio, retention_method=method)
        check_counts(answer, ratio, method)


@pytest.mark.parametrize("bad", ["magic", "", 3, ["evs"], True])
def test_bad_method_is_a_400_that_names_the_known_ones(bad: Any, server: Server, clips: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, ask(data_url(clips["plain"])), retention_method=bad)
    error = caught.value.response.json()["error"]
    assert error["param"] == "retention_method"
    assert "retention_method must be" in error["message"]


def test_large_bodies_pass_other_routes_in_linear_time(server: Server) -> None:
    """Collected once, in pieces, and only where the field could be meant."""
    filler = b'{"model": "demo", "prompt": "' + b"x" * (32 << 20) + b'"}'
    assert post(server, "/v1/completions", filler)[0] == 400, "too long a prompt for the model, said by vLLM"
    assert post(server, "/no/such/route", {"retention_ratio": 1})[0] == 404


def test_text_only_request(server: Server) -> None:
    answer = chat(server, [{"role": "user", "content": "Hello"}], retention_ratio=0.5)
    assert answer.score["videos"] == []


def test_streaming_carries_the_report_in_its_first_and_last_chunk(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]))
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(
            chat(server, messages, retention_ratio=0.25, stream=True, max_tokens=6, ignore_eos=True, **options)
        )
        assert all(not hasattr(chunk, "score") for chunk in chunks[1:-1])
        assert chunks[0].score == chunks[-1].score
        (video,) = chunks[-1].score["videos"]
        assert video["retained_tokens"] == num_retained_tokens(video["original_tokens"], 0.25)
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        whole = chat(server, messages, retention_ratio=0.25, max_tokens=6, ignore_eos=True)
        assert streamed == whole.choices[0].message.content


BAD_RATIOS = [0, -0.5, 1.0001, "0.5", "abc", True, False, [], [0.5, 0.5], [0], {"a": 1}, [[0.5]]]


@pytest.mark.parametrize("bad", BAD_RATIOS, ids=repr)
def test_bad_ratio_is_a_400_that_names_field_and_range(bad: Any, server: Server, clips: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, ask(data_url(clips["plain"])), retention_ratio=bad)
    error = caught.value.response.json()["error"]
    assert "retention_ratio" in error["message"]
    assert "(0, 1]" in error["message"]
    assert error["code"] == 400
    check_counts(chat(server, ask(data_url(clips["plain"])), retention_ratio=0.5), 0.5)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_beyond_json(bad: str, server: Server, clips: dict[str, Path]) -> None:
    body = json.dumps({"model": "demo", "messages": ask(data_url(clips["plain"])), "retention_ratio": 0})
    status, answer = post(
        server, "/v1/chat/completions", body.replace('"retention_ratio": 0', f'"retention_ratio": {bad}').encode()
    )
    assert status == 400
    assert "retention_ratio" in answer["error"]["message"]


BROKEN_VIDEOS = ["audio", "empty", "not_a_video", "playlist", "truncated", "thin"]


@pytest.mark.parametrize("name", BROKEN_VIDEOS)
def test_broken_video_is_a_400(name: str, server: Server, clips: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, ask(data_url(clips[name])), retention_ratio=0.5)
    message = caught.value.response.json()["error"]["message"]
    assert 20 < len(message) < 400
    assert str(Path.home()) not in message
    check_counts(chat(server, ask(data_url(clips["plain"])), retention_ratio=0.5), 0.5)


@pytest.mark.parametrize(
    "url",
    [
        "data:video/mp4;base64,@@@@not base64@@@@",
        "data:video/mp4;base64,AAAA*",
        "data:video/mp4,plain",
        "data:video/mp4;base64",
        "http://10.1.2.3/private.mp4",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/hostname",
        "file:///etc/passwd",
        "ftp://127.0.0.1/clip.mp4",
        "gopher://127.0.0.1/clip.mp4",
        "",
        "nonsense",
    ],
)
def test_bad_url_is_a_4xx(url: str, server: Server, clips: dict[str, Path]) -> None:
    status, answer = post(
        server, "/v1/chat/completions", {"model": "demo", "messages": ask(url), "retention_ratio": 0.5}
    )
    assert 400 <= status < 500, answer
    assert answer["error"]["message"]
    assert status == answer["error"]["code"]


@pytest.mark.parametrize("path", ["missing.mp4", ".", "a/b.mp4"])
def test_missing_file_is_the_clients_mistake(path: str, server: Server) -> None:
    body = {"model": "demo", "messages": ask(f"file://{server.media}/{path}")}
    status, answer = post(server, "/v1/chat/completions", body)
    assert status == 400, answer
    assert str(server.media) not in answer["error"]["message"]


def test_unreachable_host_is_not_this_servers_fault(server: Server) -> None:
    """Nothing listens on this port of the allowed domain."""
    body = {"model": "demo", "messages": ask(f"http://127.0.0.1:{free_port()}/clip.mp4")}
    status, answer = post(server, "/v1/chat/completions", body)
    assert status == 502, answer
    assert "cannot be reached" in answer["error"]["message"]


@pytest.mark.parametrize("field", ["retention", "retention-ratio", "retentionRatio", "retention_ration"])
def test_near_misses_of_our_fields_are_refused(field: str, server: Server, clips: dict[str, Path]) -> None:
    body = {"model": "demo", "messages": ask(data_url(clips["plain"])), field: 0.5}
    status, answer = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert "did you mean 'retention_ratio'" in answer["error"]["message"]


@pytest.fixture(scope="module")
def http_files(clips: dict[str, Path]) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clips["plain"].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = threading.Thread(target=files.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


def test_http_url(server: Server, http_files: str) -> None:
    check_counts(chat(server, ask(f"{http_files}/plain.mp4"), retention_ratio=0.25), 0.25)
    status, answer = post(
        server, "/v1/chat/completions", {"model": "demo", "messages": ask(f"{http_files}/missing.mp4")}
    )
    assert 400 <= status < 500, answer


@pytest.mark.parametrize("field", ["mm_processor_kwargs", "media_io_kwargs"])
def test_client_options_stay_refused(field: str, server: Server, clips: dict[str, Path]) -> None:
    value = {"mm_processor_kwargs": {"retention_ratio": 0.9}, "media_io_kwargs": {"video": {"num_frames": 999}}}[field]
    messages = ask(data_url(clips["plain"]))
    for path, body in {
        "/v1/chat/completions": {"messages": messages, "retention_ratio": 0.5},
        "/v1/chat/completions/batch": {"messages": [messages]},
        "/v1/responses": {"input": "hi"},
        "/tokenize": {"messages": messages},
    }.items():
        status, answer = post(server, path, {"model": "demo", field: value, **body})
        assert status == 400, (path, answer)
        assert field in answer["error"]["message"], path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "hi"}]]}),
    ],
)
def test_other_routes_refuse_the_field(path: str, body: dict[str, Any], server: Server) -> None:
    without, _ = post(server, path, {"model": "demo", **body})
    assert without == 200, "the route itself must work"
    for field, value in (("retention_ratio", 0.5), ("retention_method", "evs")):
        status, answer = post(server, path, {"model": "demo", field: value, **body})
        assert status == 400
        assert field in answer["error"]["message"]
    assert post(server, path, json.dumps({"retention_ratio": 0.5, **body}).encode("utf-16"))[0] == 400
    nested = b'{"model": "demo", "x": "\\u0041", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert post(server, path, nested)[0] == 400
    escaped = json.dumps({"model": "demo", "retention_ratio": 0.5, **body}).replace("retention_r", "retention\\u005fr")
    assert post(server, path, escaped.encode())[0] == 400


def test_upstream_surface_still_works(server: Server) -> None:
    assert [m.id for m in server.client().models.list()] == ["demo"]
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert answer.status == 200
    status, _ = post(server, "/v1/chat/completions", {"model": "demo", "messages": ask("x")}, key=None)
    assert status == 401, "the API key must guard our route"
    status, answer = post(server, "/v1/chat/completions", {"model": "other", "messages": ask("x")})
    assert status == 404, answer
    status, answer = post(server, "/v1/chat/completions", b"{broken")
    assert status == 400
    assert post(server, "/v1/completions", {"model": "demo", "prompt": "hi", "max_tokens": 2})[0] == 200


def test_openapi_types_the_field(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
        schema = json.load(answer)
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]["properties"]
    number, array, _ = fields["retention_ratio"]["anyOf"]
    assert number == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert array["items"] == number
    assert "messages" in fields


def test_metrics_count_what_happened(server: Server, fresh_clip: Path) -> None:
    before = metrics(server)
    (video,) = chat(server, ask(data_url(fresh_clip)), retention_ratio=0.25).score["videos"]
    after = metrics(server)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew("score_videos_total") == 1
    assert grew('score_visual_tokens_total{kind="original"}') == video["original_tokens"]
    assert grew('score_visual_tokens_total{kind="retained"}') == video["retained_tokens"]
    assert grew('score_retention_ratio_bucket{le="0.25"}') == 1
    assert grew('score_retention_ratio_bucket{le="0.2"}') == 0
    assert grew("score_compressor_seconds_count") == 1
    assert grew("score_compressor_seconds_sum") > 0


def test_concurrent_requests_keep_their_own_ratios(server: Server, clips: dict[str, Path]) -> None:
    """Different ratios in one batch do not leak into each other."""
    from concurrent.futures import ThreadPoolExecutor

    jobs = [(clips[name], ratio) for name in ("plain", "odd") for ratio in (1.0, 0.5, 0.25, 0.1)] * 2

    def run(job: tuple[Path, float]) -> Any:
        return chat(server, ask(data_url(job[0])), retention_ratio=job[1], max_tokens=8, ignore_eos=True)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(run, jobs))
    for (_, ratio), answer in zip(jobs, answers, strict=True):
        check_counts(answer, ratio)
        assert answer.usage.completion_tokens == 8


def test_the_banner_shows_a_line_that_works(server: Server) -> None:
    text = server.text()
    assert f"score-serve: ready at {server.url}/v1" in text
    line = next(line for line in text.splitlines() if line.startswith("curl "))
    body = json.loads(line.split(" -d '", 1)[1].rstrip("'"))
    assert body["model"] == "demo"
    assert body["retention_ratio"] == 0.1
