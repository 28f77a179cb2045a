"""The annotator against a small endpoint: retries, kills, refusals, failures, and what is left on the disk."""

from __future__ import annotations

import base64
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from PIL import Image

from score_vllm.train.annotate import __main__ as cli
from score_vllm.train.data.sources import open_source, source_config
from score_vllm.video import decode_video

GOOD = "A bright square slowly crosses a dark and noisy ground from left to right, clip {name}."


class Endpoint:
    """Answers chat completions; ``script`` maps a video's content to ``(status, body, headers)``."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.seen: Counter[str] = Counter()
        self.script: Callable[[str, int], Any] = lambda name, turn: GOOD.format(name=name)
        self.lock = threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = video_of(body).decode(errors="replace")
                with endpoint.lock:
                    endpoint.requests.append(body)
                    endpoint.keys.add(self.headers.get("Authorization"))
                    endpoint.seen[name] += 1
                    turn = endpoint.seen[name]
                self.answer(endpoint.script(name, turn))

            def answer(self, said: Any) -> None:
                if said is None:  # hang up
                    self.close_connection = True
                    return
                status, headers = 200, {}
                if isinstance(said, tuple):
                    status, said, headers = said
                if status == 200 and not isinstance(said, dict):
                    said = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
                data = json.dumps(said).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def video_of(body: dict[str, Any]) -> bytes:
    """The bytes that a request is about."""
    url = body["messages"][0]["content"][0]["video_url"]["url"]
    if url.startswith("file://"):
        return Path(unquote(urlparse(url).path)).read_bytes()
    return base64.b64decode(url.split(",", 1)[1])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six records; a "video" here holds its own name, and the endpoint answers by it."""
    rows = []
    for i in range(6):
        (tmp_path / f"clip {i}.mp4").write_bytes(f"n{i}".encode())
        rows.append({"video": f"clip {i}.mp4", "prompt": f"What about {i}?", "caption": "old"})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def index_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path / "cache"))


def arguments(endpoint: Endpoint, dataset: Path, *more: str) -> list[str]:
    base = ["--kind", "jsonl", "--data", str(dataset), "-o", str(dataset.parent / "out.jsonl"), "--quiet"]
    return [*base, "--base-url", endpoint.url, "--model", "teacher", "--backoff", "0.01", *more]


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    return int(caught.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_what_the_jsonl_source_reads(endpoint: Endpoint, dataset: Path) -> None:
    assert run(*arguments(endpoint, dataset)) == 0
    out = dataset.parent / "out.jsonl"
    rows = lines(out)
    assert [row["caption"] for row in rows] == [GOOD.format(name=f"n{i}") for i in range(6)], "in the data's order"
    assert {row["teacher"] for row in rows} == {"teacher"}
    source: Any = open_source(source_config(kind="jsonl", path=str(out), split="all"))
    for i in range(6):
        record = source.record(i)
        assert record.prompt == f"What about {i}?"
        assert record.target == GOOD.format(name=f"n{i}")
        assert record.video.read_bytes() == f"n{i}".encode()
    assert not (dataset.parent / "out.failures.jsonl").exists()
    assert run(*arguments(endpoint, dataset)) == 0
    assert len(endpoint.requests) == 6, "a second run asks nothing"


def test_what_is_sent(endpoint: Endpoint, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret-key")
    more = ["--api-key-env", "TEACHER_KEY", "--prompt", "Tell all.", "--retention-ratio", "0.25", "--max-tokens", "77"]
    assert run(*arguments(endpoint, dataset, *more, "--send", "file", "--temperature", "0.5", "--limit", "2")) == 0
    assert len(endpoint.requests) == 2
    for body in endpoint.requests:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("teacher", 77, 0.5)
        assert body["retention_ratio"] == 0.25
        video, text = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "Tell all."}
        assert re.fullmatch(r"file:///.*/clip%20\d\.mp4", video["video_url"]["url"])
    assert endpoint.keys == {"Bearer secret-key"}
    assert not any("secret-key" in p.read_text(errors="replace") for p in dataset.parent.glob("out*"))
    assert run(*arguments(endpoint, dataset, *more, "--send", "file", "--temperature", "0.5")) == 0
    assert len(endpoint.requests) == 6, "a larger limit goes on"


def test_without_options_nothing_special_is_sent(endpoint: Endpoint, dataset: Path) -> None:
    assert run(*arguments(endpoint, dataset, "--limit", "1", "--api-key-env", "NO_SUCH_VARIABLE")) == 0
    (body,) = endpoint.requests
    assert set(body) == {"model", "messages", "max_tokens", "temperature"}
    assert body["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert endpoint.keys == {None}


def test_a_fault_of_the_program_keeps_its_traceback(
    endpoint: Endpoint, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr("score_vllm.train.annotate.run.write_results", broken)
    with pytest.raises(ValueError, match="on purpose"):
        cli.main(arguments(endpoint, dataset))


def test_passing_troubles_are_tried_again(endpoint: Endpoint, dataset: Path) -> None:
    troubles = {"n0": (503, {"error": {"message": "busy"}}, {}), "n1": (429, {}, {"Retry-After": "0"}), "n2": None}

    def script(name: str, turn: int) -> Any:
        return troubles[name] if name in troubles and turn < 3 else GOOD.format(name=name)

    endpoint.script = script
    assert run(*arguments(endpoint, dataset)) == 0
    assert {name: endpoint.seen[name] for name in ("n0", "n1", "n2", "n3")} == {"n0": 3, "n1": 3, "n2": 3, "n3": 1}


def test_failures_are_named_and_asked_again(
    endpoint: Endpoint, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.parent / "clip 3.mp4").unlink()
    with dataset.open("a") as file:
        file.write("not json\n")
    bad = {
        "n0": (400, {"error": {"message": "no such codec"}}, {}),
        "n1": (500, {"error": "out of memory"}, {}),
        "n2": {"unexpected": 1},
    }
    endpoint.script = lambda name, turn: bad.get(name, GOOD.format(name=name))
    assert run(*arguments(endpoint, dataset, "--retries", "1")) == 1
    out, failures = dataset.parent / "out.jsonl", dataset.parent / "out.failures.jsonl"
    assert [row["video"][-10:] for row in lines(out)] == ["clip 4.mp4", "clip 5.mp4"]
    reasons = [row["reason"] for row in lines(failures)]
    for reason, part in zip(
        reasons,
        ["HTTP 400: no such codec", "HTTP 500: out of memory (after 2 tries)", "not a chat", "cannot read", "JSON"],
        strict=True,
    ):
        assert part in reason
    assert endpoint.seen["n0"] == 1, "the client's mistake is not tried again"
    assert endpoint.seen["n1"] == 2
    assert "2 kept" in (said := capsys.readouterr().out)
    assert "5 failed" in said
    bad.clear()
    assert run(*arguments(endpoint, dataset, "--retries", "1")) == 1, "two records stay broken"
    assert len(lines(out)) == 5
    assert len(lines(failures)) == 2
    assert endpoint.seen["n4"] == 1


def test_filters_reject_by_name(endpoint: Endpoint, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        "n0": "",
        "n1": "I'm sorry, I can't see any video here.",
        "n2": "a b c d " * 30,
        "n3": "What about 3? Well, here is a square that moves.",
        "n4": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    }
    endpoint.script = lambda name, turn: said.get(name, f"<think>Hm.</think> {GOOD.format(name=name)}")
    assert run(*arguments(endpoint, dataset)) == 0, "a filter that works is no failure"
    out = capsys.readouterr().out
    for line in ("2 rejected, empty", "1 rejected, refusal", "1 rejected, repeated", "1 rejected, prompt_echo"):
        assert line in out
    assert [row["caption"] for row in lines(dataset.parent / "out.jsonl")] == [GOOD.format(name="n5")]
    named = {row["reason"]: row["text"] for row in lines(dataset.parent / "out.failures.jsonl")}
    assert named["refusal"] == said["n1"]
    said.clear()
    assert run(*arguments(endpoint, dataset)) == 0
    assert endpoint.seen["n1"] == 1, "what was rejected is not asked again"
    assert run(*arguments(endpoint, dataset, "--retry-rejected")) == 0
    assert len(lines(dataset.parent / "out.jsonl")) == 6
    assert not (dataset.parent / "out.failures.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_everything_ends_the_run(
    status: int, endpoint: Endpoint, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.script = lambda name, turn: (status, {"error": {"message": "go away"}}, {})
    assert run(*arguments(endpoint, dataset, "--concurrency", "1")) == 3
    assert len(endpoint.requests) == 1
    assert f"HTTP {status}: go away" in capsys.readouterr().err
    assert not (dataset.parent / "out.jsonl").exists()


def test_an_endpoint_that_is_gone_ends_the_run(endpoint: Endpoint, dataset: Path, tmp_path: Path) -> None:
    dataset.write_text("".join(json.dumps({"video": "clip 1.mp4", "prompt": f"{i}?"}) + "\n" for i in range(200)))
    endpoint.script = lambda name, turn: None
    assert run(*arguments(endpoint, dataset, "--concurrency", "2", "--retries", "0")) == 3
    assert len(endpoint.requests) < 30


def test_a_kill_loses_only_what_was_on_its_way(endpoint: Endpoint, dataset: Path) -> None:
    """SIGKILL with two answers logged and one on its way; the next run asks for the rest alone."""
    release = threading.Event()

    def script(name: str, turn: int) -> Any:
        if name == "n2" and turn == 1:
            release.wait(120)
        return GOOD.format(name=name)

    endpoint.script = script
    command = [sys.executable, "-m", "score_vllm.train.annotate", *arguments(endpoint, dataset, "--concurrency", "1")]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + 120
        while "n2" not in endpoint.seen and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        assert endpoint.seen == {"n0": 1, "n1": 1, "n2": 1}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        release.set()
    log = dataset.parent / "out.log.jsonl"
    assert not (dataset.parent / "out.jsonl").exists()
    with log.open("ab") as file:
        file.write(b'{"key": "half')  # as if the kill had met a write
    assert run(*arguments(endpoint, dataset)) == 0
    assert endpoint.seen == {"n0": 1, "n1": 1, "n2": 2, "n3": 1, "n4": 1, "n5": 1}
    assert len(lines(dataset.parent / "out.jsonl")) == 6


def test_other_settings_are_another_run(endpoint: Endpoint, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments(endpoint, dataset)) == 0
    before = (dataset.parent / "out.log.jsonl").read_bytes()
    assert run(*arguments(endpoint, dataset, "--retention-ratio", "0.5")) == 2
    assert "retention_ratio was None, is 0.5" in capsys.readouterr().err
    assert (dataset.parent / "out.log.jsonl").read_bytes() == before


def test_changed_questions_are_asked_again(endpoint: Endpoint, dataset: Path) -> None:
    assert run(*arguments(endpoint, dataset)) == 0
    dataset.write_text(dataset.read_text().replace("What about 1?", "What with 1??"))
    assert run(*arguments(endpoint, dataset)) == 0
    assert endpoint.seen == {"n0": 1, "n1": 2, "n2": 1, "n3": 1, "n4": 1, "n5": 1}


def test_folders_of_frames_and_made_clips_are_sent_as_mp4(endpoint: Endpoint, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    frames = tmp_path / "hound"
    frames.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 48), (30 * i, 0, 0)).save(frames / f"{i}.jpeg")
    (tmp_path / "a.jsonl").write_text(json.dumps({"video": "hound", "prompt": "?"}))
    said = GOOD.format(name="any")
    endpoint.script = lambda name, turn: said
    assert run(*arguments(endpoint, tmp_path / "a.jsonl")) == 0
    assert decode_video(video_of(endpoint.requests[0]), fps=0).frames.shape == (6, 48, 64, 3)

    pictures = [{"bytes": p.read_bytes(), "path": None} for p in sorted(frames.iterdir())]
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Red."}]
    table = {"id": [str(i) for i in range(6)], "image": [*pictures[:5], None], "conversations": [talk] * 6}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    args = arguments(endpoint, tmp_path / "a.parquet")
    args[1] = "onevision-pseudo"
    assert run(*args) == 2, "no folder for the clips"
    (tmp_path / "out.log.jsonl").unlink()
    args += ["--clips", str(tmp_path / "made"), "--prompt", "Tell all."]
    assert run(*args) == 1, "one row has no image"
    rows = lines(tmp_path / "out.jsonl")
    assert len(rows) == 5
    (tmp_path / "any").touch()
    readable = {path.stat().st_mode for path in (tmp_path / "made").glob("*.mp4")}
    assert readable == {(tmp_path / "any").stat().st_mode}, "other users can read them, as any new file"
    original = open_source(source_config(kind="onevision-pseudo", path=str(tmp_path / "a.parquet"), split="all"))
    annotated = open_source(source_config(kind="jsonl", path=str(tmp_path / "out.jsonl"), split="all"))
    for i in range(5):
        assert annotated[i].target == said
        count = len(annotated[i].frames)
        assert count == -(-len(original[i].frames) // 2) * 2, "serving completes the last cell"
        assert np.abs(annotated[i].frames[0].astype(int) - original[i].frames[0]).mean() < 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "out.json"], "must end in .jsonl"),
        (["--concurrency", "0"], "--concurrency must be >= 1"),
        (["--retention-ratio", "1.5"], r"retention_ratio must be in \(0, 1\]"),
        (["--base-url", "127.0.0.1:80"], "base_url must begin with http"),
        (["--option", "min_clarity=0.5"], "unknown key 'dataset.min_clarity'"),
        (["--option", "nonsense=1"], "unknown key 'dataset.nonsense'"),
        (["--option", "held_out"], "KEY=VALUE"),
        (["--option", "held_out=many"], "held_out must be a number"),
        (["--data", "/no/such.jsonl"], "no file there"),
        (["--allow", "boring"], "allow must be names out of"),
        (["--min-words", "0"], "min_words"),
        (["--timeout", "0"], "timeout must be > 0"),
        (["--split", "test"], "split must be one of"),
    ],
)
def test_wrong_usage(
    more: list[str], message: str, endpoint: Endpoint, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments(endpoint, dataset, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not endpoint.requests


def test_clips_that_are_made_are_captioned(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda *_: GOOD.format(name="shapes")
    out = tmp_path / "out.jsonl"
    argv = ["--kind", "world", "--limit", "2", "--clips", str(tmp_path / "clips"), "-o", str(out), "--quiet"]
    assert run(*argv, "--base-url", endpoint.url, "--model", "teacher") == 0
    rows = lines(out)
    assert [row["caption"] for row in rows] == [GOOD.format(name="shapes")] * 2
    assert all((tmp_path / row["video"]).suffix == ".mp4" and (tmp_path / row["video"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data is missing"),
        (["--data", "x.jsonl", "--limit", "-1"], "--limit must be"),
        (["--data", "x.jsonl", "--option", "colour=red"], "unknown key 'dataset.colour'"),
    ],
)
def test_mistakes_in_the_dataset_name_the_option(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["--base-url", "http://127.0.0.1:9/v1", "--model", "teacher", "-o", str(tmp_path / "out.jsonl")]
    assert run("--kind", "jsonl", *argv, *end) == 2
    assert message in capsys.readouterr().err
