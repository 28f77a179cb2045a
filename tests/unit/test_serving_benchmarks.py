"""The arithmetic of the serving benchmarks, with numbers worked out by hand."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")
from benchmarks.serving import aggregate, bench_serve, client, generation, load, scaling, stage_split


def sse(*chunks: dict[str, Any], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n"] if done else lines).encode()


def chunk(text: str, completion: int, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 40, "completion_tokens": completion}
    return {"choices": [{"delta": {"content": text}}], "usage": usage, **more}


def test_events_survive_any_cut() -> None:
    data = sse(chunk("é", 1), chunk("\n", 2))
    whole = client.EventParser().feed(data)
    assert len(whole) == 3
    parser = client.EventParser()
    assert [event for byte in data for event in parser.feed(bytes([byte]))] == whole


def make_answer() -> client.Answer:
    """Sent at 10; tokens at 12 (one), 12.5 (one), 13.5 (two in one chunk)."""
    answer = client.Answer(10.0)
    answer.feed(sse(chunk("", 0), done=False), 11.9)
    answer.feed(sse(chunk("a", 1), done=False), 12.0)
    answer.feed(sse(chunk("", 2), done=False), 12.5)
    answer.feed(sse(chunk("cd", 4), done=False), 13.5)
    answer.feed(sse(chunk("", 4, score={"videos": [{"retained_tokens": 7}]})), 13.6)
    return answer


def test_token_times_by_hand() -> None:
    answer = make_answer()
    assert answer.ttft == 2.0, "the role chunk has no token"
    assert answer.gaps() == [0.5, 0.5, 0.5], "two tokens in one chunk share its gap"
    assert answer.tokens == 4
    assert answer.text == "acd"


def test_token_ids_are_collected() -> None:
    answer = client.Answer(0.0)
    for n, ids in enumerate(([5], None, [6, 7])):
        piece = chunk("", n)
        piece["choices"][0]["token_ids"] = ids
        answer.feed(sse(piece, done=False), float(n))
    assert answer.ids == [5, 6, 7]
    assert make_answer().ids == []


def test_only_gaps_while_all_streams_generate_count() -> None:
    """The first stream's early gaps hold the second one's prefill; the second one's last gap is alone."""
    first, second = client.Answer(0.0), client.Answer(0.0)
    first.arrivals = [(1.0, 1), (4.0, 1), (5.0, 1), (6.0, 2)]
    second.arrivals = [(4.0, 1), (5.0, 1), (6.0, 1), (6.25, 1)]
    assert generation.shared_gaps([first, second]) == [1.0, 0.5, 0.5, 1.0, 1.0]


def request(max_tokens: int, ratio: float | None = None, counts: client.Counts | None = None) -> client.Request:
    return client.Request("u", "t", max_tokens, ratio, counts)


def test_problems_are_named() -> None:
    """The prompt had 40 tokens, and 7 of the video's were kept: 0.5 of 14 or 15."""
    good = client.Counts(15, 33)
    assert make_answer().problem(request(4, 0.5, good)) is None
    assert make_answer().problem(request(4)) is None
    assert "4 tokens came instead of 5" in str(make_answer().problem(request(5, 0.5, good)))
    assert "40 tokens instead of 41" in str(make_answer().problem(request(4, 0.5, client.Counts(15, 34))))
    assert "[7] retained tokens instead of [8]" in str(make_answer().problem(request(4, 0.5, client.Counts(16, 32))))
    assert make_answer().problem(request(4, None, client.Counts(20, 20))) is None, "vanilla reports nothing"
    cut = client.Answer(0.0)
    cut.feed(sse(chunk("a", 1), done=False), 1.0)
    assert "without [DONE]" in str(cut.problem(request(1)))
    broken = client.Answer(0.0)
    broken.feed(sse({"error": {"message": "no"}}), 1.0)
    assert "error event" in str(broken.problem(request(1)))
    with pytest.raises(ValueError, match="no token"):
        _ = broken.ttft


def test_body_leaves_the_ratio_out_for_vanilla() -> None:
    assert "retention_ratio" not in request(1).body("m")
    body = request(1, 0.25).body("m")
    assert (body["retention_ratio"], body["max_tokens"], body["stream"]) == (0.25, 1, True)


def record(sent: float, end: float, ratio: float | None = 0.1, error: str | None = None) -> dict[str, Any]:
    times = {"sent": sent, "end": end, "ttft": 0.5, "itl": [0.1, 0.3]}
    return {**times, "retention_ratio": ratio, "prompt_tokens": 100, "completion_tokens": 3, "error": error}


def test_aggregate_by_hand() -> None:
    """Four requests within 4 s: two good ones, one failed, one that left no record."""
    row = aggregate.aggregate([record(1, 3), record(2, 5), record(2, 4, error="boom")], expected=4)
    assert row["failures"] == 2
    assert row["seconds"] == 4
    assert row["requests_per_second"] == 0.5
    assert row["output_tokens_per_second"] == 1.5
    assert row["prompt_tokens"] == 200
    assert row["ttft_ms"] == {"p50": 500.0, "p95": 500.0, "p99": 500.0, "mean": 500.0}
    assert row["itl_ms"]["p50"] == pytest.approx(200)
    assert row["tpot_ms"]["mean"] == pytest.approx(200)
    assert row["e2e_ms"]["p50"] == pytest.approx(2500)


def test_aggregate_of_nothing_but_failures() -> None:
    row = aggregate.aggregate([record(0, 1, error="x")], expected=1)
    assert (row["failures"], row["requests_per_second"], row["ttft_ms"]) == (1, 0.0, None)
    for records in ([], [record(0, 1)] * 2):
        with pytest.raises(ValueError, match="records"):
            aggregate.aggregate(records, expected=1)


def test_a_plan_knows_the_exact_counts() -> None:
    counts, clips = client.Counts(1536, 30), [Path(f"/{i}.mp4") for i in range(4)]
    made = load.make_requests(counts, clips, (None, 0.1), 4, first=10)
    assert [one.text for one in made] == [load.question(i) for i in (10, 11, 12, 13)]
    assert [one.counts.prompt(one.ratio) for one in made if one.counts] == [1566, 183, 1566, 183]
    assert counts.kept(0.1) == 153
    assert len({one.url for one in made}) == 4
    with pytest.raises(ValueError, match="as many clips"):
        load.make_requests(counts, clips[:1], (0.1,), 2)
    with pytest.raises(ValueError, match="ratios"):
        load.make_requests(counts, clips[:1], (), 1)


def test_requests_survive_the_file(tmp_path: Path) -> None:
    """Those of vanilla, and without known counts, too."""
    made = [request(4, 0.25, client.Counts(8, 9)), request(5)]
    client.write_requests(tmp_path / "plan.json", made)
    assert client.read_requests(tmp_path / "plan.json") == made


def test_two_clients_must_see_the_exact_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests of 0.5 * 14 + 33 = 40 tokens each."""
    theirs = {"failed": 0, "request_throughput": 2.0, "total_input_tokens": 80}
    theirs |= {"median_ttft_ms": 3.0, "p95_ttft_ms": 4.0, "median_tpot_ms": 5.0}
    monkeypatch.setattr(bench_serve, "run_bench", lambda command, folder: theirs)
    ours = {"failures": 0, "requests_per_second": 1.0, "prompt_tokens": 80}
    ours |= {"ttft_ms": {"p50": 6.0, "p95": 7.0}, "tpot_ms": {"p50": 8.0}}
    asked = [client.Request("file:///a.mp4", "t", 4, 0.5, client.Counts(14, 33))] * 2
    rows = bench_serve.crosscheck("u", "m", asked, 2, tmp_path / "one", ours)
    times = [[row[key] for key in ("client", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms")] for row in rows]
    assert times == [["vllm bench serve", 3.0, 4.0, 5.0], ["locust", 6.0, 7.0, 8.0]]
    assert json.loads((tmp_path / "one" / "sharegpt.json").read_text())[0]["video"] == "/a.mp4"
    for client_row in (theirs | {"total_input_tokens": 160}, theirs | {"failed": 1}):
        monkeypatch.setattr(bench_serve, "run_bench", lambda command, folder, row=client_row: row)
        with pytest.raises(SystemExit, match="80 prompt tokens are right"):
            bench_serve.crosscheck("u", "m", asked, 2, tmp_path / str(id(client_row)), ours)


def test_questions_have_one_length() -> None:
    assert len({len(load.question(i)) for i in (0, 9, 10, 9999)}) == 1


def test_configurations() -> None:
    names = [(config.name, config.ratios) for config in load.configurations([0.4, 0.1])]
    assert names == [
        ("vanilla", (None,)),
        ("SCORE 40%", (0.4,)),
        ("SCORE 10%", (0.1,)),
        ("SCORE mixed", (1.0, 0.4, 0.1)),
    ]
    assert len(load.configurations([0.1])) == 2


def spans(*entries: tuple[str, float, float]) -> list[Any]:
    return [stage_split.Span(*entry) for entry in entries]


WHOLE = (
    ("download", 0.25, 0.5),
    ("decode", 0.5, 1.0),
    ("preprocess", 1.0, 1.25),
    ("encode", 1.5, 2.5),
    ("compress", 2.25, 2.5),
    ("llm", 2.5, 3.0),
    ("llm", 3.25, 3.5),
)


def test_stages_by_hand() -> None:
    """Sent at 0, first token at 4. Gaps of 0.25 before downloading and encoding and between the two LLM steps."""
    stages = stage_split.split(spans(*WHOLE), 0.0, 4.0, compressed=True)
    assert stages == {
        "download": 0.25,
        "decode": 0.5,
        "preprocess": 0.25,
        "hand-over": 0.75,
        "ViT": 0.75,
        "compress": 0.25,
        "LLM prefill": 0.75,
        "first token": 0.5,
    }
    assert tuple(stages) == stage_split.STAGES
    assert sum(stages.values()) == 4.0
    plain = [entry for entry in WHOLE if entry[0] != "compress"]
    assert stage_split.split(spans(*plain), 0.0, 4.0, compressed=False)["ViT"] == 1.0


@pytest.mark.parametrize(
    ("entries", "compressed", "message"),
    [
        (WHOLE, False, "unexpected stages"),
        ([e for e in WHOLE if e[0] != "compress"], True, "'compress' must have one span"),
        ([e for e in WHOLE if e[0] != "llm"], True, "'llm' has no span"),
        ([*WHOLE, ("decode", 3.6, 3.7)], True, "'decode' must have one span"),
        ([*WHOLE, ("llm", 3.6, 4.5)], True, "outside of the request"),
        ([*WHOLE, ("llm", 2.9, 3.1)], True, "begins before"),
        ([*[e for e in WHOLE if e[0] != "compress"], ("compress", 2.5, 2.6)], True, "is not inside"),
    ],
)
def test_stages_that_cannot_be(entries: Any, compressed: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_split.split(spans(*entries), 0.0, 4.0, compressed)


def test_spans_are_read_once_and_only_whole_lines(tmp_path: Path) -> None:
    reader = stage_split.SpanReader(tmp_path)
    file = tmp_path / "spans-1.jsonl"
    file.write_text('{"name": "llm", "start": 2, "end": 3}\n{"name": "de')
    (tmp_path / "spans-2.jsonl").write_text('{"name": "decode", "start": 1, "end": 2}\n')
    assert [span.name for span in reader.new()] == ["decode", "llm"]
    assert reader.new() == []
    with file.open("a") as more:
        more.write('code", "start": 4, "end": 5}\n')
    assert [span.start for span in reader.new()] == [4]


@pytest.mark.parametrize("truth", [0, 8, 10, 62, 64, 66, 126, 640, 998, 1000])
def test_the_longest_that_fits(truth: int) -> None:
    tried: list[int] = []

    def fits(frames: int) -> bool:
        assert frames % 2 == 0
        assert frames <= 1000
        tried.append(frames)
        return frames <= truth

    assert scaling.longest_that_fits(fits, 8, 1000) == truth
    assert len(tried) == len(set(tried)) <= 18
    if 0 < truth < 1000:
        assert truth + 2 in tried, "the next longer one was refused, not guessed"


def test_the_search_refuses_odd_bounds() -> None:
    with pytest.raises(ValueError, match="even"):
        scaling.longest_that_fits(lambda _: True, 7, 100)


def test_an_engine_that_ran_out_of_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has not given the failed request up: a second request to the same engine would wait behind it."""
    made: list[str] = []

    class Engine:
        def close(self) -> None:
            made.append("closed")

    def ask(engine: Any, shape: Any, seed: int, ratio: float | None, tokens: int = 1) -> dict[str, Any]:
        assert ratio == 0.5
        if shape.frames <= 20:
            return {"prompt_tokens": counts(shape.frames).prompt(ratio)}
        return {"refused": f"{shape.frames} are too many", **({"broken": True} if shape.frames > 24 else {})}

    def counts(frames: int) -> client.Counts:
        return client.Counts(frames, 7)

    monkeypatch.setattr(scaling, "ask", ask)
    args = argparse.Namespace(ratio=[0.5], fit_limit=64, fit_tokens=256)
    size = partial(scaling.ClipShape, height=56, width=56)
    row = scaling.find_longest("score", lambda: made.append("made") or Engine(), size, counts, args)
    assert (row["longest_frames"], row["at_limit"], row["refusal"]) == (20, False, "22 are too many")
    assert made == ["made", "closed", "made", "closed"]
    wrong = partial(scaling.checked, {"prompt_tokens": 12}, client.Counts(8, 7))
    assert wrong(0.625)["prompt_tokens"] == 12
    with pytest.raises(SystemExit, match="12 prompt tokens instead of 15"):
        wrong(None)
