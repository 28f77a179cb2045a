"""The entry point and a whole run of it against a stub endpoint: what is sent, probed, resumed and withheld."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.public_sets import videomme_rows, write_lvbench, write_mlvu, write_videomme
from tests.stub_server import Answer, Stub, completion, compressing, stub_server

pytest.importorskip("pyarrow")
from benchmarks import accuracy
from score_vllm import client

STEMS = ("one", "two", "three")


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.random, "uniform", lambda low, high: 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def run(tmp_path: Path, stub: Stub) -> Callable[..., int]:
    """Run Video-MME over three files that stand for videos."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for stem in STEMS:
        (videos / f"{stem}.mp4").write_bytes(stem.encode())
    data = write_videomme(tmp_path / "set.parquet", videomme_rows(STEMS))

    def call(*arguments: str, benchmark: str = "videomme", path: Path = data) -> int:
        fixed = ["--benchmark", benchmark, "--data", str(path), "--videos", str(videos), "--base-url", stub.url]
        return accuracy.main([*fixed, "--output", str(tmp_path / "out.json"), "--retries", "0", *arguments])

    return call


def results(tmp_path: Path) -> dict[str, Any]:
    content = json.loads((tmp_path / "out.json").read_text())
    assert isinstance(content, dict)
    return content


def test_a_whole_run(run: Callable[..., int], stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All answers are "A", and the right ones are A, B, C."""
    assert run("--retention-ratio", "1", "0.25", "--retention-method", "evs", "--api-key", "secret") == 0
    content = results(tmp_path)
    assert [row["retention_ratio"] for row in content["rows"]] == [1.0, 0.25]
    for row, tokens in zip(content["rows"], (1020, 270), strict=True):
        assert row["headline"] == {
            "accuracy": pytest.approx(100 / 3),
            "low": pytest.approx(6.149, abs=1e-3),
            "high": pytest.approx(79.234, abs=1e-3),
            "correct": 1,
            "total": 3,
        }
        assert {name: group["accuracy"] for name, group in row["groups"].items()} == {
            "short": 100,
            "medium": 0,
            "long": 0,
        }
        assert row["prompt_tokens_mean"] == tokens
        assert (row["scored"], row["unanswered"], row["failed"], row["complete"]) == (3, 0, 0, True)
    assert content["probe"] == {"question": "001-1", "prompt_tokens": {"0.25": 270, "1.0": 1020}}
    assert content["model"] == "stub", "asked from the endpoint"
    assert "secret" not in (tmp_path / "out.json").read_text() + (tmp_path / "out.answers.jsonl").read_text()
    out = capsys.readouterr().out
    assert "33.3 [6.1, 79.2]" in out
    assert "3 of 2700 questions" in out

    assert len(stub.bodies) == 2 + 6, "the probe, then three questions at two ratios"
    assert all(headers["Authorization"] == "Bearer secret" for headers in stub.headers)
    body = stub.bodies[-1]
    video, text = body["messages"][0]["content"]
    url = video["video_url"]["url"]
    assert url.startswith("data:video/mp4;base64,")
    assert base64.b64decode(url.partition(",")[2]).decode() in STEMS
    assert text["text"].endswith("The best answer is:")
    assert (body["retention_method"], body["temperature"], body["max_tokens"]) == ("evs", 0, 16)
    assert sorted(b["retention_ratio"] for b in stub.bodies[2:]) == [0.25] * 3 + [1.0] * 3


def test_default_ratio_sends_no_field(run: Callable[..., int], stub: Stub) -> None:
    assert run("--retention-ratio", "default") == 0
    assert all("retention_ratio" not in b and "retention_method" not in b for b in stub.bodies)
    assert len(stub.bodies) == 3


def test_what_is_read_of_each_video(run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    """In every request, the probe's too, and in the results."""
    assert run("--video-fps", "0.5", "--video-max-frames", "64", "--retention-ratio", "0.5") == 0
    assert {(b["video_fps"], b["video_max_frames"]) for b in stub.bodies} == {(0.5, 64)}
    assert (results(tmp_path)["video_fps"], results(tmp_path)["video_max_frames"]) == (0.5, 64)
    assert run("--retention-ratio", "0.5") == 2, "answers of another reading are not mixed in"
    for wrong in (["--video-fps", "0"], ["--video-fps", "x"], ["--video-max-frames", "0"]):
        with pytest.raises(SystemExit):
            run(*wrong)


@pytest.mark.parametrize("send", ["file", "server", "url"])
def test_how_videos_are_named(send: str, run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    options = {
        "file": ["--send", "file"],
        "server": ["--send", "file", "--server-videos", "/data/my videos/"],
        "url": ["--send", "url", "--video-base-url", "https://host/v/"],
    }[send]
    assert run(*options) == 0
    urls = {b["messages"][0]["content"][0]["video_url"]["url"] for b in stub.bodies}
    start = {"file": (tmp_path / "videos").as_uri(), "server": "file:///data/my%20videos", "url": "https://host/v"}[
        send
    ]
    assert urls == {f"{start}/{stem}.mp4" for stem in STEMS}


@pytest.mark.parametrize("benchmark", ["mlvu", "lvbench"])
def test_other_sets(benchmark: str, run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    """MLVU's right answers are all A, LVBench's all D."""
    if benchmark == "mlvu":
        path = write_mlvu(tmp_path / "json", [f"{stem}.mp4" for stem in STEMS])
    else:
        path = write_lvbench(tmp_path / "video_info.meta.jsonl", STEMS)
    assert run("--retention-ratio", "0.5", benchmark=benchmark, path=path) == 0
    (row,) = results(tmp_path)["rows"]
    assert row["headline"]["accuracy"] == (100 if benchmark == "mlvu" else 0)
    expected = {
        "mlvu": {"plotQA": 1, "needle": 1, "count": 1},
        "lvbench": {"key information retrieval": 1, "event understanding": 1, "reasoning": 2},
    }[benchmark]
    assert {name: group["total"] for name, group in row["groups"].items()} == expected
    roles = [message["role"] for message in stub.bodies[-1]["messages"]]
    assert roles == (["system", "user"] if benchmark == "mlvu" else ["user"])


def test_a_server_that_ignores_the_ratio_is_found_out(
    run: Callable[..., int], stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda _: completion(prompt_tokens=1000)
    assert run("--retention-ratio", "0.1") == 1
    assert "the server ignores retention_ratio" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    assert run("--retention-ratio", "0.1", "--no-probe") == 0
    assert results(tmp_path)["probe"] is None


def test_a_server_without_usage_cannot_be_verified(
    run: Callable[..., int], stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply = lambda _: completion(prompt_tokens=None)
    assert run("--retention-ratio", "0.1") == 1
    assert "no usage.prompt_tokens" in capsys.readouterr().err


def test_probe_where_the_whole_video_does_not_fit(run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        return (400, {"error": {"message": "too long"}}) if body["retention_ratio"] > 0.5 else compressing(body)

    stub.reply = reply
    assert run("--retention-ratio", "0.2") == 0
    assert results(tmp_path)["probe"]["prompt_tokens"] == {"0.1": 120, "0.2": 220}


def test_another_method_than_asked_is_found_out(
    run: Callable[..., int], stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> Answer:
        status, content = compressing(body)
        return status, {**content, "score": {"method": "vidcom2"}}

    stub.reply = reply
    assert run("--retention-ratio", "0.1", "--retention-method", "evs") == 1
    assert "retention_method 'evs' was asked for, and the server used 'vidcom2'" in capsys.readouterr().err


def _fails_for(stem: str, answer: Answer) -> Callable[[dict[str, Any]], Answer]:
    encoded = base64.b64encode(stem.encode()).decode()

    def reply(body: dict[str, Any]) -> Answer:
        return answer if encoded in json.dumps(body) else compressing(body)

    return reply


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"error": {"message": "the prompt is too long"}}), "HTTP 400: the prompt is too long"),
        ((500, b"boom"), "HTTP 500: boom"),
        ((200, b"<html>"), "not a chat completion"),
        ((200, {"object": "error"}), "not a chat completion"),
    ],
)
def test_a_failure_withholds_the_score_and_is_asked_again(
    answer: Answer,
    reason: str,
    run: Callable[..., int],
    stub: Stub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.reply = _fails_for("two", answer)
    assert run("--retention-ratio", "0.5") == 1
    (row,) = results(tmp_path)["rows"]
    assert row["headline"] is None
    assert row["groups"] == {}
    assert list(row["failures"]) == ["002-1"]
    assert row["failures"]["002-1"].startswith(reason)
    captured = capsys.readouterr()
    assert f"002-1: {reason}" in captured.err
    assert "withheld" in captured.out

    assert run("--retention-ratio", "0.5", "--allow-failures") == 1
    content = results(tmp_path)
    assert content["over_answered_only"] is True
    assert content["rows"][0]["headline"]["total"] == 2
    assert "OVER ANSWERED QUESTIONS ONLY" in capsys.readouterr().out

    stub.reply = compressing
    stub.bodies.clear()
    assert run("--retention-ratio", "0.5") == 0
    assert len(stub.bodies) == 2 + 1, "the probe, and the one question without an answer"
    assert results(tmp_path)["rows"][0]["headline"]["total"] == 3


def test_a_missing_video_is_a_failure(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos" / "three.mp4").unlink()
    assert run("--retention-ratio", "0.5") == 1
    assert "003-1: video 'three' not found in" in capsys.readouterr().err
    assert results(tmp_path)["rows"][0]["headline"] is None


def test_retries(run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    seen: list[int] = []

    def reply(body: dict[str, Any]) -> Answer:
        seen.append(1)
        return (503, b"busy") if len(seen) % 2 else compressing(body)

    stub.reply = reply
    assert run("--retries", "1", "--concurrency", "1") == 0
    assert len(seen) == 6
    assert results(tmp_path)["rows"][0]["complete"]


def test_nobody_listens(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--base-url", "http://127.0.0.1:9/v1") == 1
    assert "ConnectError" in capsys.readouterr().err


def test_it_stops_after_too_many_failures(run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    stub.reply = lambda _: (500, b"boom")
    assert run("--max-failures", "1", "--concurrency", "1") == 1
    assert len(stub.bodies) == 1
    assert (results(tmp_path)["rows"][0]["failed"], results(tmp_path)["rows"][0]["not_asked"]) == (1, 2)


def test_resume_asks_only_what_is_missing(run: Callable[..., int], stub: Stub, tmp_path: Path) -> None:
    assert run("--limit", "2") == 0
    assert len(stub.bodies) == 2
    assert run() == 0
    assert len(stub.bodies) == 3
    assert run("--retention-ratio", "1", "default") == 0
    assert len(stub.bodies) == 6, "another ratio joins the same file"
    assert [row["scored"] for row in results(tmp_path)["rows"]] == [3, 3]


@pytest.mark.parametrize(
    "change", [["--prompt", "lmms-eval"], ["--max-tokens", "8"], ["--retention-method", "evs"], ["--model", "other"]]
)
def test_answers_of_another_configuration_are_refused(
    change: list[str], run: Callable[..., int], stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    asked = len(stub.bodies)
    assert run(*change) == 2
    assert "holds answers of another configuration" in capsys.readouterr().err
    assert len(stub.bodies) == asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention-ratio", "0"], "must be a number in (0, 1], or 'default'"),
        (["--retention-ratio", "nan"], "must be a number in (0, 1], or 'default'"),
        (["--retention-ratio", "much"], "must be a number in (0, 1], or 'default'"),
        (["--concurrency", "0"], "must be an integer >= 1, got '0'"),
        (["--retries", "-1"], "must be an integer >= 0"),
        (["--videos", "/no/such/folder"], "--videos must be a folder"),
        (["--data", "/no/such/file.json"], "no such file"),
        (["--send", "url"], "--send url and --video-base-url go together"),
        (["--server-videos", "/x"], "--server-videos goes with --send file"),
        (["--send", "file", "--server-videos", "x"], "--server-videos must be an absolute path, got 'x'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, run: Callable[..., int], stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = run(*arguments)
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    assert message in capsys.readouterr().err
    assert stub.bodies == []


def test_the_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        accuracy.main(["--help"])
    assert caught.value.code == 0
    assert "{world,footage,videomme,mlvu,lvbench}" in capsys.readouterr().out
    monkeypatch.setitem(accuracy.MODULES, "world", "accuracy_nowhere")
    with pytest.raises(SystemExit, match="--benchmark world needs the package 'accuracy_nowhere'"):
        accuracy.main([])
