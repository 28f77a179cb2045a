"""The soak's parts: damaged files of every container, faults that hit what they name, answers compared."""

from __future__ import annotations

import os
import resource
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.serving import soak, soak_faults
from benchmarks.serving.soak_media import mutate, mutated_clips, whole_clips
from score_vllm.video import VideoError, decode_video, sandbox


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    return whole_clips()


def test_every_container_is_read_before_it_is_damaged(whole: dict[str, bytes]) -> None:
    assert len(whole) == 15
    for name, data in whole.items():
        assert len(decode_video(data).frames) > 1, name


def test_mutations_are_distinct_spread_and_the_same_in_every_run(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(mutated_clips(tmp_path / name, 45))
    # Some encoders go by the clock; these do not.
    one, other = ([path.read_bytes() for path in run if path.suffix in (".gif", ".apng")] for run in runs)
    assert one == other
    assert len({path.read_bytes() for path in runs[0]}) == 45
    assert set(Counter(path.suffix for path in runs[0]).values()) == {3}


def test_edits() -> None:
    data = bytes(range(100))
    assert mutate(data, [("cut", 0.5, b"x")]) == data[:25]
    assert mutate(data, [("zero", 0.0, b"xyz")]) == bytes(3) + data[3:]
    assert mutate(data, [("delete", 0.1, b"xy")]) == data[:1] + data[3:]
    assert mutate(data, [("repeat", 0.0, b"x")]) == bytes(2) + data
    assert mutate(data, [("swap", 0.0, b"xyz")]) == bytes([2, 1, 0]) + data[3:]
    assert mutate(data, [("flip", 0.0, b"\xff")]) == b"\xff" + data[1:]


def test_the_mixture_is_whole_and_good_requests_differ() -> None:
    assert sum(soak.MIX.values()) == 100
    questions = soak.questions_of([Path("/a.mp4"), Path("/b.mp4"), Path("/c.mp4")])
    assert {len(question.clips) for question in questions["two videos"]} == {2}
    assert set(questions) <= set(soak.MIX)
    body = questions["two videos"][0].body(True, stream=True)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["video_url", "video_url", "text"]


def test_other_tokens_or_no_answer_are_faults() -> None:
    campaign = soak.Campaign("http://127.0.0.1:1", [Path("/a.mp4"), Path("/b.mp4")], [])
    (question, *_) = campaign._questions["good"]

    def answer(*ids: int, status: int = 200) -> httpx.Response:
        return httpx.Response(status, json={"choices": [{"token_ids": list(ids)}]})

    campaign._compare(question, answer(1, 2), "good")
    campaign._compare(question, answer(1, 2), "good")
    assert campaign.faults == []
    campaign._compare(question, answer(1, 3), "good")
    campaign._compare(question, answer(status=500), "good")
    assert len(campaign.faults) == 2
    stream = 'data: {"choices": [{"token_ids": [1]}]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
    headers = {"content-type": "text/event-stream"}
    assert soak.tokens_of(httpx.Response(200, text=stream, headers=headers)) == [1]
    with pytest.raises(ValueError, match="the stream ended with"):
        soak.tokens_of(httpx.Response(200, text=stream.replace("[DONE]", '{"error": 1}'), headers=headers))


def test_faults_hit_the_decoder_and_pass(whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_faults, "FAULT_SECONDS", 0.5)
    sandbox.stop()
    try:
        frames = sandbox.decode_video_isolated(whole["mp4"]).frames
        before = soak_faults.decoder_of(os.getpid())
        soak_faults.kill_decoder(os.getpid())
        assert (sandbox.decode_video_isolated(whole["mp4"]).frames == frames).all()
        decoder = soak_faults.decoder_of(os.getpid())
        assert decoder != before
        soak_faults.kill_decoding_children(os.getpid())
        assert (sandbox.decode_video_isolated(whole["mp4"]).frames == frames).all()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
        for fault in (soak_faults.little_memory, soak_faults.few_descriptors):
            working = threading.Thread(target=fault, args=(os.getpid(),))
            working.start()
            while working.is_alive():
                try:
                    assert (sandbox.decode_video_isolated(whole["mp4"]).frames == frames).all()
                except VideoError:
                    continue
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == descriptors
        assert soak_faults.decoder_of(os.getpid()) == decoder
        assert (sandbox.decode_video_isolated(whole["mp4"]).frames == frames).all()
    finally:
        sandbox.stop()
