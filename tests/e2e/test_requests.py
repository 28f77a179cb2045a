"""What requests say about their videos, what responses say was read, and refusals, on a running score-serve."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("openai")
from .conftest import API_KEY, ROOT, Server
from .requests_of import ask, chat, data_url, post

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module", autouse=True)
def hanging(server: Server) -> Iterator[list[Future[Any]]]:
    """Requests for videos of a media server that sends a byte now and then, while every test of this module runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip(client: socket.socket) -> None:
        try:
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
                while not over.wait(0.5):
                    client.sendall(b"x")
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    body = {"model": "demo", "messages": ask(f"http://127.0.0.1:{listener.getsockname()[1]}/clip.mp4")}
    with ThreadPoolExecutor(12) as pool:
        yield [pool.submit(post, server, CHAT, body) for _ in range(12)]
        over.set()
    listener.close()


def refused(server: Server, body: dict[str, Any], path: str = CHAT, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal, of one sentence."""
    got, answer = post(server, path, {"model": "demo", "max_tokens": 4, **body})
    assert got == status, answer
    error = answer["error"]
    assert error["code"] == status
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


def read_of(answer: Any) -> dict[str, Any]:
    (video,) = answer.score["videos"]
    return video


def test_a_window_and_what_was_read(server: Server, clips: dict[str, Path]) -> None:
    """`plain` has 48 pictures in 6 s."""
    messages = ask(data_url(clips["plain"]))
    whole = read_of(chat(server, messages))
    assert (whole["duration"], whole["window"], whole["source_frames"]) == (6, [0, 6], 48)
    assert (whole["frames"], whole["first"], whole["step"]) == (12, 0, 0.5)
    assert whole["source_size"] == [160, 120]
    assert whole["warnings"] == []
    part = read_of(chat(server, messages, video_start=2, video_end=4.0, video_fps=4))
    assert part["window"] == [2, 4]
    assert (part["frames"], part["first"], part["step"]) == (8, 2, 0.25)
    assert part["grid"][0] == 4
    few = read_of(chat(server, messages, video_max_frames=4))
    assert few["frames"] == 4
    assert few["last"] > 4


def test_one_window_per_video(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]), data_url(clips["odd"]))
    answer = chat(server, messages, video_start=[1, None], video_end=[3, 2], video_max_frames=[4, 2])
    assert [video["window"] for video in answer.score["videos"]] == [[1, 3], [0, 2]]
    assert [video["frames"] for video in answer.score["videos"]] == [4, 2]


def apart_from_cells(score: dict[str, Any]) -> dict[str, Any]:
    """Without what was encoded for this request alone."""
    own = ("encoded_cells", "reused_cells")
    return score | {"videos": [{k: v for k, v in video.items() if k not in own} for video in score["videos"]]}


def cache_hits(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:mm_cache_hits_total"))


def test_windows_and_the_cache(server: Server, fresh_clip: Path) -> None:
    """Equal windows share an entry and say the same; different ones share nothing."""
    messages = ask(data_url(fresh_clip))
    first = chat(server, messages, video_end=2)
    before = cache_hits(server)
    again = chat(server, messages, video_end=2.0, retention_ratio=0.1)
    assert cache_hits(server) == before + 1
    assert apart_from_cells(again.score) == apart_from_cells(first.score)
    for fields in ({"video_end": 1}, {"video_start": 1}, {"video_fps": 1}, {"video_max_frames": 2}, {}):
        chat(server, messages, **fields)
        assert cache_hits(server) == before + 1, fields


def test_a_video_known_by_its_uuid(server: Server, fresh_clip: Path) -> None:
    def named(url: str | None) -> list[dict[str, Any]]:
        part = {"type": "video_url", "video_url": {"url": url} if url else None, "uuid": fresh_clip.parent.name}
        return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]

    first = chat(server, named(data_url(fresh_clip)), video_end=2)
    again = chat(server, named(None), video_end=2)
    assert apart_from_cells(again.score) == apart_from_cells(first.score)
    refused(server, {"messages": named(None), "video_end": 1})


def test_streams_say_it_at_both_ends(server: Server, clips: dict[str, Path]) -> None:
    chunks = list(chat(server, ask(data_url(clips["plain"])), stream=True, video_start=1, video_end=2))
    assert read_of(chunks[-1])["window"] == [1, 2]
    assert all(not hasattr(chunk, "score") for chunk in chunks[1:-1])


def test_token_counts_are_those_of_the_answer(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]))
    for fields in ({}, {"retention_ratio": 1.0}, {"retention_ratio": 0.5, "video_end": 2}, {"retention_method": "evs"}):
        answer = chat(server, messages, **fields)
        status, counted = post(server, "/tokenize", {"model": "demo", "messages": messages, **fields})
        assert status == 200, counted
        assert counted["count"] == answer.usage.prompt_tokens
        assert counted["score"] == apart_from_cells(answer.score)
    assert post(server, "/tokenize", {"model": "demo", "prompt": "Hello"})[0] == 200
    assert "no messages" in refused(server, {"prompt": "Hello", "retention_ratio": 0.5}, "/tokenize")["message"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"video_start": 6.5}, "video_start", "6"),
        ({"video_start": -1}, "video_start", "[0, 604800], got -1"),
        ({"video_start": 3, "video_end": 2}, "video_end", "above video_start = 3, got 2"),
        ({"video_fps": 1000}, "video_fps", "(0, 240], got 1000"),
        ({"video_max_frames": 129}, "video_max_frames", "[1, 128]"),
        ({"video_fps": [1, 2]}, "video_fps", "2 entries, but the request has 1 video"),
        ({"fps": 1}, "fps", "did you mean 'video_fps'"),
    ],
)
def test_out_of_range(
    path: str, fields: dict[str, Any], field: str, said: str, server: Server, clips: dict[str, Path]
) -> None:
    error = refused(server, {"messages": ask(data_url(clips["plain"])), **fields}, path)
    assert field in error["message"]
    assert said in error["message"]
    assert error["param"] == field


def jpegs(*sizes: tuple[int, int]) -> str:
    parts = []
    for i, size in enumerate(sizes):
        picture = io.BytesIO()
        Image.new("RGB", size, (i, i, i)).save(picture, "JPEG")
        parts.append(base64.b64encode(picture.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(parts)


def test_jpeg_sequences(server: Server) -> None:
    url = jpegs(*[(64, 48)] * 160)
    video = read_of(chat(server, ask(url), video_fps=10))
    assert (video["frames"], video["source_frames"], video["duration"]) == (128, 160, 16)
    assert (video["first"], video["last"]) == (0, 15.9)
    error = refused(server, {"messages": ask(jpegs((64, 48), (64, 48), (48, 64)))})
    for part in ("frame 2", "48x64", "64x48"):
        assert part in error["message"]


def test_data_urls_as_they_are_written(server: Server, clips: dict[str, Path]) -> None:
    plain = base64.b64encode(clips["plain"].read_bytes()).decode()
    for head, data in (
        ("data:video/webm;codecs=vp8,opus;base64,", plain),
        ("data:video/mp4;base64,", base64.encodebytes(clips["plain"].read_bytes()).decode()),
        ("data:video/mp4;base64,", plain.rstrip("=")),
    ):
        assert read_of(chat(server, ask(head + data)))["frames"] == 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF"])
def test_animated_pictures_are_videos(kind: str, server: Server) -> None:
    pictures = [Image.new("RGB", (64, 64), (20 * i, 0, 0)) for i in range(10)]
    file = io.BytesIO()
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=500)
    url = f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
    video = read_of(chat(server, ask(url)))
    assert (video["source_frames"], round(video["duration"], 1)) == (10, 5)


def test_other_forms_of_a_video(server: Server, clips: dict[str, Path]) -> None:
    url = data_url(clips["plain"])
    text = {"type": "text", "text": "What happens?"}
    expected = chat(server, ask(url), max_tokens=8, ignore_eos=True).choices[0].message.content
    for part in (
        {"type": "video_url", "video_url": url},
        {"type": "video", "video": url},
        {"type": "input_video", "input_video": {"url": url}},
    ):
        messages = [{"role": "user", "content": [part, text]}]
        answer = chat(server, messages, max_tokens=8, ignore_eos=True)
        assert answer.choices[0].message.content == expected
        assert read_of(answer)["frames"] == 12
    image = {"type": "image_url", "image_url": {"url": url.replace("video/mp4", "image/png")}}
    error = refused(server, {"messages": [{"role": "user", "content": [image, text]}]})
    assert "it is a video" in error["message"]
    image = {"type": "image_url", "image_url": {"url": url}}
    error = refused(server, {"messages": [{"role": "user", "content": [image, text]}]})
    assert "a video is sent as" in error["message"]


def test_hints_at_the_right_place(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]))
    error = refused(server, {"messages": messages, "extra_body": {"retention_ratio": 0.5}})
    assert "write retention_ratio at the top level" in error["message"]
    error = refused(server, {"messages": messages, "media_io_kwargs": {"video": {"fps": 1}}})
    assert "video_fps" in error["message"]
    assert error["param"] == "media_io_kwargs"
    for path, key in {"/v1/responses": "input", "/v1/messages": "messages"}.items():
        error = refused(server, {key: messages}, path)
        assert error["message"].startswith(f"videos are supported on {CHAT}, not on {path}")


def test_a_body_that_is_too_large_is_not_waited_for(server: Server) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(513 << 20),
        "Authorization": f"Bearer {API_KEY}",
    }
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert "--max-body-mib 512" in json.loads(response.read())["error"]["message"]
    connection.close()


def test_health_while_media_servers_hang(server: Server, hanging: list[Future[Any]]) -> None:
    """The event loop is free, and so is the way for other videos: the tests above and below were answered."""
    assert not any(request.done() for request in hanging[:1]) or hanging[0].result()[0] == 504
    for _ in range(5):
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
            assert answer.status == 200
        time.sleep(0.2)


HARD = {
    "base64_trailing_newline": None,
    "data_url_codecs_comma": None,
    "jpeg_160": None,
    "jpeg_two_sizes": ("frame", "x"),
    "extra_body_nested": ("write retention_ratio at the top level",),
    "per_request_fps": ("video_fps",),
}


@pytest.mark.parametrize("name", HARD)
def test_every_hard_request(name: str, server: Server, shared_dir: Path) -> None:
    body = json.loads((shared_dir / "videos_hard" / f"{name}.json").read_text())
    if (said := HARD[name]) is not None:
        message = refused(server, body)["message"]
        assert all(part in message for part in said), message
        return
    status, answer = post(server, CHAT, body)
    assert status == 200, answer
    if name == "jpeg_160":
        (video,) = answer["score"]["videos"]
        assert (video["frames"], video["source_frames"], video["first"]) == (128, 160, 0)
        assert video["last"] == pytest.approx(video["duration"] * 159 / 160, abs=0.01)


# Frames read and seconds of the source; a warning where the file is not as it should be.
HARD_FILES = {
    "anim.avif": (4, 1.0),
    "anim.gif": (4, 2.0),
    "browser_share.webm": (120, 59.5),
    "browser_slowstart.webm": (18, 9.0),
    "cut1s.mp4": (4, 1.08),
    "editlist_trim.mp4": (12, 6.0),
    "hflip.mp4": (20, 10.0),
    "qtrle.mov": (4, 2.0),
    "size_change_vp8.webm": (20, 10.0),
    "size_turn_vp8.webm": (20, 10.0),
    "transpose.mp4": (20, 10.0),
    "ts_concat_overlap.ts": (20, 10.0),
    "ts_jump.ts": (20, 10.0),
    "two_video.mp4": (20, 10.0),
    "vfr_screen.mp4": (46, 22.9),
    "vfr_screen.webm": (46, 23.0),
    "wmv2.wmv": (20, 10.0),
}
WARNED = ("size_", "ts_")


def test_every_hard_file(server: Server, shared_dir: Path) -> None:
    for name, (frames, duration) in HARD_FILES.items():
        path = shared_dir / "videos_hard" / name
        status, answer = post(server, CHAT, {"model": "demo", "max_tokens": 2, "messages": ask(data_url(path))})
        assert status == 200, (name, answer)
        (video,) = answer["score"]["videos"]
        assert video["frames"] == frames, name
        assert video["duration"] == pytest.approx(duration, abs=0.05), name
        assert bool(video["warnings"]) == name.startswith(WARNED), (name, video["warnings"])
    error = refused(server, {"messages": ask(data_url(shared_dir / "videos_hard" / "size_3840x16.mp4"))})
    assert "3840x16: the longer side may be at most 200 times the other" in error["message"]


def test_examples_of_the_serving_page(server: Server) -> None:
    """As printed, but for the address, the key, and where the videos are."""
    page = (ROOT / "docs" / "serving.md").read_text()
    section = page[page.index("### Fields of a request") : page.index("### How a video is sent")]
    for shown, here in (
        ("http://127.0.0.1:8000", server.url),
        ('api_key="none"', f'api_key="{API_KEY}"'),
        ("curl -s", f"curl -s -H 'Authorization: Bearer {API_KEY}'"),
        ("https://example.com/lecture.mp4", f"file://{server.media}/plain.mp4"),
        ("https://example.com/clip.webm", f"file://{server.media}/odd.mkv"),
    ):
        assert shown in section
        section = section.replace(shown, here)
    bash, python = re.findall(r"```(?:bash|python)\n(.*?)```", section, re.DOTALL)
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)["score"]["videos"]
    assert (first["window"], first["frames"], first["retention_ratio"]) == ([2, 4], 8, 0.1)
    assert (second["window"][0], second["retention_ratio"]) == (0, 0.5)
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
    assert done.stdout == f"[2.0, 4.0] 8 {first['retained_tokens']} []\n"


def test_openapi_types_fields_and_report(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
        schema = json.load(answer)
    schemas = schema["components"]["schemas"]

    def named(reference: dict[str, str]) -> dict[str, Any]:
        return schemas[reference["$ref"].rsplit("/", 1)[-1]]

    post_chat = schema["paths"][CHAT]["post"]
    fields = named(post_chat["requestBody"]["content"]["application/json"]["schema"])["properties"]
    for name, kind in {"video_start": "number", "video_end": "number", "video_fps": "number"}.items():
        number, array, null = fields[name]["anyOf"]
        assert number["type"] == kind
        assert "maximum" in number
        assert array["items"]["anyOf"] == [number, {"type": "null"}]
        assert null == {"type": "null"}
    assert fields["video_max_frames"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    for code in ("400", "422", "502", "503", "504"):
        assert code in post_chat["responses"]
    response = named(post_chat["responses"]["200"]["content"]["application/json"]["schema"])["properties"]
    report = named(response["score"])["properties"]
    video = named(report["videos"]["items"])["properties"]
    assert {"duration", "window", "frames", "first", "last", "step", "warnings"} <= set(video)
    tokenize = schema["paths"]["/tokenize"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert "score" in named(tokenize)["properties"]


def test_media_servers_that_hang_end_with_the_deadline(hanging: list[Future[Any]]) -> None:
    """Last in this file: the 30 s went by while the others ran."""
    for request in hanging:
        status, answer = request.result(timeout=120)
        assert status == 504, answer
        assert "did not deliver the file within 30 s" in answer["error"]["message"]
