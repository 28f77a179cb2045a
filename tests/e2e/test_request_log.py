"""The log's line per request on a running score-serve."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
from .conftest import Server
from .requests_of import ask, chat, data_url, metrics, post


def line_of(server: Server, request_id: str) -> dict[str, str]:
    """The fields logged of a request; a line may come a moment after the answer."""
    end = time.monotonic() + 30
    while not (found := re.findall(rf"^INFO .* score: request (request_id=\S*{request_id} .*)$", server.text(), re.M)):
        assert time.monotonic() < end, f"no line about {request_id}"
        time.sleep(0.05)
    assert len(found) == 1
    return dict(pair.split("=", 1) for pair in found[0].split(" "))


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_request_cost(stream: bool, server: Server, fresh_clip: Path) -> None:
    seconds = "score_tower_seconds_sum", "score_tower_seconds_count"
    before = metrics(server)
    answer = chat(server, ask(data_url(fresh_clip)), retention_ratio=0.25, stream=stream)
    if stream:
        answer = list(answer)[-1]
    (video,) = answer.score["videos"]
    line = line_of(server, answer.id)
    assert (line["path"], line["status"], line["method"]) == ("/v1/chat/completions", "200", "score")
    assert (line["videos"], line["ratio"]) == ("1", "0.25")
    for name in ("original_tokens", "retained_tokens", "structure_tokens"):
        assert int(line[name]) == video[name]
    times = {name: float(line[name]) for name in line if name.endswith("_ms")}
    assert set(times) == {f"{name}_ms" for name in ("decode", "tower", "compressor", "queue", "prefill", "total")}
    assert min(times["decode_ms"], times["tower_ms"], times["compressor_ms"]) > 0
    # vLLM's prefill is from the first step to the first token, and encodes in between.
    assert times["tower_ms"] + times["compressor_ms"] <= times["prefill_ms"]
    assert times["decode_ms"] + times["queue_ms"] + times["prefill_ms"] <= times["total_ms"]
    after = metrics(server)
    assert after[seconds[1]] == before[seconds[1]] + 1
    assert after[seconds[0]] - before[seconds[0]] == pytest.approx(times["tower_ms"] / 1000, abs=1e-5)

    again = line_of(server, chat(server, ask(data_url(fresh_clip), text="Again?"), retention_ratio=0.25).id)
    assert (again["tower_ms"], again["compressor_ms"]) == ("-", "-"), "the encoder cache had it"
    assert float(again["decode_ms"]) > 0


def test_text_and_refusals(server: Server) -> None:
    text = line_of(server, chat(server, [{"role": "user", "content": "Hello"}]).id)
    assert (text["videos"], text["ratio"], text["decode_ms"], text["tower_ms"]) == ("0", "-", "-", "-")
    assert float(text["prefill_ms"]) > 0
    count = server.text().count("path=/v1/chat/completions status=400")
    assert post(server, "/v1/chat/completions", {"model": "demo", "messages": ask("data:,x")})[0] == 400
    end = time.monotonic() + 30
    while server.text().count("path=/v1/chat/completions status=400") == count:
        assert time.monotonic() < end
        time.sleep(0.05)
