"""What operations ask of a running score-serve: long clips at every ratio, clients that go away, sampling fields."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm")
from tests.conftest import moving_square, write_clip

from .conftest import API_KEY, Server
from .requests_of import ask, chat, check_counts, data_url, metrics, post


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 s of 448 x 448: 5,408 visual tokens, more than a step of the engine at default flags."""
    return write_clip(tmp_path_factory.mktemp("long") / "long.mp4", moving_square(64, 448, 448, seed=9), fps=2)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 1.0])
def test_every_ratio_of_a_long_clip_at_default_flags(ratio: float, server: Server, long_clip: Path) -> None:
    video = check_counts(chat(server, ask(data_url(long_clip)), retention_ratio=ratio), ratio)
    assert video["grid"] == [32, 13, 13]


def test_a_clip_above_the_limit_is_a_400_with_tokens_limit_and_flags(server: Server) -> None:
    """Frames so thin that no resizing brings them under the pixel limit: some tokens more than 192 in a row."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((28, 5600, 3), 200, np.uint8)).save(buffer, "JPEG")
    frame = base64.b64encode(buffer.getvalue()).decode()
    url = "data:video/jpeg;base64," + ",".join([frame] * 128)
    for ratio in (0.1, 1.0):
        status, answer = post(
            server, "/v1/chat/completions", {"model": "demo", "messages": ask(url), "retention_ratio": ratio}
        )
        assert status == 400, answer
        message = answer["error"]["message"]
        assert re.search(r"the video has 12\d{3} visual tokens \(64 x 1 x 19[3-9]\)", message)
        for part in ("at most 12288", "--max-frames 128", "--max-pixels 150528"):
            assert part in message


def test_seed_is_refused_where_the_engine_would_end_and_passes_where_it_is_not_used(
    server: Server, clips: dict[str, Path]
) -> None:
    messages = ask(data_url(clips["plain"]))
    for path, body in {
        "/v1/chat/completions": {"messages": messages},
        "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    }.items():
        status, answer = post(server, path, {"model": "demo", "seed": 7, "temperature": 0.8, **body})
        assert status == 400, answer
        assert "seed 7 is not supported by vLLM's CPU engine at temperature 0.8" in answer["error"]["message"]
        assert answer["error"]["param"] == "seed"
        assert post(server, path, {"model": "demo", "seed": 7, "temperature": 0, **body})[0] == 200


def test_several_answers_to_one_video(server: Server, clips: dict[str, Path]) -> None:
    """The video is compressed once, and reported once."""
    before = metrics(server)["score_videos_total"]
    for stream in (False, True):
        answer = chat(
            server, ask(data_url(clips["odd"])), n=3, temperature=1.0, max_tokens=6, stream=stream, retention_ratio=0.3
        )
        if stream:
            chunks = list(answer)
            assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1, 2}
            answer = chunks[-1]
        else:
            assert len(answer.choices) == 3
        check_counts(answer, 0.3)
    assert metrics(server)["score_videos_total"] - before == 2


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"logprobs": True, "top_logprobs": 3}, "/v1/chat/completions"),
        ({"prompt_logprobs": 1}, "/v1/chat/completions"),
        ({"logit_bias": {"9": 50}}, "/v1/chat/completions"),
        ({"min_tokens": 3}, "/v1/chat/completions"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "/v1/chat/completions"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}},
         "/v1/chat/completions"),
        ({"best_of": 2}, "/v1/chat/completions"),
        ({"use_beam_search": True, "n": 2}, "/v1/chat/completions"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_sampling_fields_over_a_video(
    fields: dict[str, Any], path: str, server: Server, clips: dict[str, Path]
) -> None:
    """Served, or refused as the client's mistake; never the end of the engine."""
    body = {"model": "demo", "messages": ask(data_url(clips["plain"])), "max_tokens": 6, "temperature": 0, **fields}
    status, answer = post(server, path, body)
    assert status == 200 or (status == 400 and answer["error"]["message"]), answer
    check_counts(chat(server, ask(data_url(clips["plain"])), retention_ratio=0.5), 0.5)


def running(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as page:
        lines = page.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))


@pytest.mark.parametrize("after_chunks", [0, 3])
def test_a_client_that_goes_away_frees_its_place(after_chunks: int, server: Server, fresh_clip: Path) -> None:
    """Before the first token, while the video is encoded, or in the middle of the answer."""
    body = {
        "model": "demo", "messages": ask(data_url(fresh_clip)), "retention_ratio": 0.9,
        "stream": after_chunks > 0, "max_tokens": 20_000, "ignore_eos": True, "temperature": 0,
    }  # fmt: skip
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    if after_chunks:
        stream = connection.getresponse()
        while after_chunks:
            after_chunks -= stream.readline().startswith(b"data: ")
        stream.close()
    else:
        while not running(server):
            time.sleep(0.02)
    connection.close()
    end = time.monotonic() + 30
    while running(server):
        assert time.monotonic() < end, "the engine goes on with a request that nobody reads"
        time.sleep(0.1)
    check_counts(chat(server, ask(data_url(fresh_clip)), retention_ratio=0.5), 0.5)


def test_the_answer_says_what_was_encoded(server: Server, fresh_clip: Path) -> None:
    def cells(**fields: Any) -> tuple[int, int]:
        answer = chat(server, ask(data_url(fresh_clip)), **fields)
        (video,) = (list(answer)[-1] if fields.get("stream") else answer).score["videos"]
        assert video["encoded_cells"] + video["reused_cells"] == video["grid"][0]
        return video["encoded_cells"], video["reused_cells"]

    before = metrics(server)
    encoded, reused = cells(retention_ratio=0.5)
    assert (encoded > 0, reused) == (True, 0)
    assert cells(retention_ratio=0.5) == (0, encoded), "vLLM's own caches know the whole video"
    assert cells(retention_ratio=0.25, stream=True) == (0, encoded), "the cell cache knows its cells"
    assert cells(retention_method="evs") == (0, encoded)
    assert cells(video_end=2.0) == (0, 2), "a window of the same file"
    after = metrics(server)
    assert after["score_encoded_cells_total"] - before["score_encoded_cells_total"] == encoded
    assert after["score_reused_cells_total"] - before["score_reused_cells_total"] == 2 * encoded + 2
    assert after["score_cell_cache_bytes"] > 0
    messages = {"model": "demo", "messages": ask(data_url(fresh_clip))}
    status, counted = post(server, "/tokenize", messages)
    assert status == 200
    assert "encoded_cells" not in counted["score"]["videos"][0], "nothing is encoded to count tokens"


def test_the_metrics_page_counts_broken_videos(server: Server) -> None:
    assert metrics(server)["score_nan_videos_total"] == 0
