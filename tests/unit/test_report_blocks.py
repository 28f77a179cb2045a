"""Blocks of the serving benchmarks, from documents whose ratios are easy to see."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks.public.scoring import Accuracy, Score
from benchmarks.report import load_blocks
from benchmarks.report.__main__ import picture_source

BLOCKS = load_blocks()

MACHINE = {"environment": {"machine": "a machine"}, "model": "a model"}


def sample(value: float) -> dict[str, Any]:
    return {"median": value, "spread": 0.0, "values": [value]}


def scaling_document() -> dict[str, Any]:
    def row(name: str, frames: int, scale: float) -> dict[str, Any]:
        times = {"llm_ms": 40 * scale, "compressor_ms": 5 * (name == "score"), "total_ms": 100 * scale}
        prompt = {"visual_tokens": frames, "prompt_tokens": int(frames * 10 * scale)}
        memory = {"peak_bytes_above_rest": int(2**20 * 8 * scale)}
        return {"row": name, "frames": frames, **prompt, **{k: sample(v) for k, v in times.items()}, **memory}

    rows = [row("vanilla", 8, 1.0), row("score", 8, 0.25), row("vanilla", 16, 1.0)]
    rows.append({"row": "score", "frames": 16, "refused": "too long"})
    fit = [
        {"row": "vanilla", "retention_ratio": None, "context_tokens": 2048, "longest_frames": 60, "at_limit": False},
        {"row": "score", "retention_ratio": 0.25, "context_tokens": 2048, "longest_frames": 4096, "at_limit": True},
    ]
    return {**MACHINE, "arguments": {"width": "56", "height": "28", "repeats": "1"}, "rows": rows, "fit": fit}


def load_document() -> dict[str, Any]:
    def row(name: str, users: int, scale: float) -> dict[str, Any]:
        spread = dict.fromkeys(("p50", "p95", "p99", "mean"), 100 * scale)
        times = dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"), spread)
        more = {"requests": 8, "failures": 0, "requests_per_second": 2 / scale, "peak_rss_bytes": int(1000 * scale)}
        return {"config": name, "concurrency": users, **times, **more}

    rows = [row("vanilla", 1, 1.0), row("vanilla", 2, 2.0), row("SCORE 10%", 1, 0.5), row("SCORE 10%", 2, 0.5)]
    arguments = {"max_tokens": "4", "frames": "8", "width": "56", "height": "28"}
    return {**MACHINE, "arguments": arguments, "rows": rows}


def ttft_document() -> dict[str, Any]:
    names = ("download", "decode", "preprocess", "hand-over", "ViT", "compress", "LLM prefill", "first token")

    def row(name: str, stage: float) -> dict[str, Any]:
        stages = {stage_name: sample(stage) for stage_name in names}
        return {"row": name, "prompt_tokens": 10, "ttft_ms": sample(8 * stage), "stages_ms": stages}

    arguments = {"frames": "8", "width": "56", "height": "28"}
    return {**MACHINE, "arguments": arguments, "rows": [row("vanilla", 10.0), row("SCORE 10%", 5.0)]}


def cells(text: str) -> list[list[str]]:
    """Rows of the first table under its header and rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_scaling() -> None:
    text = BLOCKS["scaling"].part(scaling_document(), "scaling_x.json")
    assert cells(text) == [
        ["8", "80 / 20", "4.0x", "4.0x", "20%", "8 / 2", ""],
        ["16", "", "", "", "", "", "refused by score"],
    ]
    assert "context of 2,048 tokens: 60 frames with vanilla, at least 4,096 with SCORE 25%" in text


def test_load() -> None:
    text = BLOCKS["load"].part(load_document(), "load_x.json")
    half, quarter = "0.50 / 0.50 / 0.50", "0.25 / 0.25 / 0.25"
    assert cells(text) == [
        ["SCORE 10%", "1", "2.00x", half, half, half, "0.50x", "0 + 0 of 8 each"],
        ["SCORE 10%", "2", "4.00x", quarter, quarter, quarter, "0.25x", "0 + 0 of 8 each"],
    ]


def test_load_where_nothing_was_answered() -> None:
    document = load_document()
    nothing = dict.fromkeys(("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"), None)
    document["rows"][0] |= {**nothing, "requests_per_second": 0.0, "failures": 8}
    (first, _) = cells(BLOCKS["load"].part(document, "load_x.json"))
    assert first == ["SCORE 10%", "1", "-", "-", "-", "-", "0.50x", "0 + 8 of 8 each"]


def test_crosscheck() -> None:
    def row(client: str, scale: float) -> dict[str, Any]:
        times = {"ttft_p50_ms": 10 * scale, "ttft_p95_ms": 20 * scale, "tpot_p50_ms": 4 * scale}
        return {"config": "vanilla", "client": client, "failures": 0, "requests_per_second": 3 / scale, **times}

    rows = [row("vllm bench serve", 2.0), row("locust", 1.0)]
    document = {**MACHINE, "arguments": {"requests": "24", "concurrency": "4"}, "rows": rows}
    text = BLOCKS["crosscheck"].part(document, "crosscheck_x.json")
    assert cells(text) == [["vanilla", "0.50x", "2.00x", "2.00x", "2.00x", "0 / 0"]]


def test_generation() -> None:
    times = {("vanilla", 1): 20.0, ("SCORE 10%", 1): 10.0, ("vanilla", 4): 40.0, ("SCORE 10%", 4): 10.0}
    rows = [{"row": name, "streams": streams, "gap_ms": sample(ms)} for (name, streams), ms in times.items()]
    document = {**MACHINE, "arguments": {"max_tokens": "8", "repeats": "1"}, "rows": rows}
    text = BLOCKS["generation"].part(document, "generation_x.json")
    assert cells(text) == [["1", "0.50x"], ["4", "0.25x"]]


def test_public_accuracy() -> None:
    """From what the public runner writes, withheld figures included."""
    found = Accuracy.of([True, True, False, True])
    scored = Score(1.0, found, {"short": found}, 4, 1, {}, 0, 1234.4, ["score"])
    withheld = Score(0.1, None, {}, 2, 0, {"7": "HTTP 500", "8": "HTTP 500"}, 0, None, ["score"])
    facts = {"title": "A set", "headline": "overall", "asked": 4, "published_size": 2700, "prompt": "official"}
    document = {**MACHINE, **facts, "rows": [scored.to_json(), withheld.to_json()]}
    text = BLOCKS["accuracy_public"].part(document, "x.json")
    lines = {line[0]: line[1:] for line in cells(text)}
    assert lines["overall"][0].startswith("75.0 [")
    assert lines["overall"][1] == lines["short"][1] == "withheld"
    assert lines["tokens per request"] == ["1,234", "-"]
    assert lines["unanswered (wrong)"] == ["1", "0"]
    assert lines["failed"] == ["0", "2"]
    assert "4 of 2700 questions: not the published set's figure" in text
    assert "OVER ANSWERED" not in text
    assert "OVER ANSWERED" in BLOCKS["accuracy_public"].part({**document, "over_answered_only": True}, "x.json")


@pytest.mark.parametrize(
    ("name", "document"),
    [("scaling", scaling_document()), ("load", load_document()), ("ttft_stages", ttft_document())],
)
def test_pictures_carry_what_they_were_drawn_from(tmp_path: Path, name: str, document: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    data = BLOCKS[name].picture(document, "0" * 64)
    width, height = struct.unpack(">II", data[16:24])
    assert width > 500
    assert height > 200
    (tmp_path / "x.png").write_bytes(data)
    assert picture_source(tmp_path / "x.png") == "0" * 64


def world_document() -> dict[str, Any]:
    def row(name: str, ratio: float, accuracy: float, seeds: int = 0) -> dict[str, Any]:
        more = {"spread": 0.01 if seeds else None, "seeds": {str(n): accuracy for n in range(seeds)}}
        return {
            "method": name,
            "retention_ratio": ratio,
            "achieved_ratio": ratio,
            "accuracy": accuracy,
            "kinds": {"count": accuracy - 0.1, "shape": accuracy},
            **more,
        }

    rows = [row("vanilla", 1.0, 0.9), row("random", 0.4, 0.8), row("score", 0.4, 0.85, 2), row("late", 0.4, 0.7)]
    rows += [row("random", 0.1, 0.5), row("score", 0.1, 0.84, 2), row("late", 0.1, 0.6)]
    made = {"commit": "abc", "uncommitted_changes": False, "time": "2026-01-02T03:04:05Z"}
    later = {"commit": "def", "uncommitted_changes": True, "time": "2026-02-03T03:04:05Z"}
    added = [{"methods": ["late"], "environment": later}]
    return {"environment": made, "questions": 100, "clips": 10, "added": added, "rows": rows}


def test_leaderboard_ranks_by_the_tenth_and_says_when_each_row_was_made() -> None:
    text = BLOCKS["leaderboard"].render({"accuracy_world.json": world_document(), "accuracy_videomme_x.json": {}})
    first, second = text.split("(100 questions")
    assert cells(first) == [
        ["", "all tokens", "", "90.0", "90.0", "abc", "2026-01-02"],
        ["1", "score", "trained, 2 seeds", "85.0 ± 1.0", "84.0 ± 1.0", "abc", "2026-01-02"],
        ["2", "late", "", "70.0", "60.0", "def*", "2026-02-03"],
        ["3", "random", "", "80.0", "50.0", "abc", "2026-01-02"],
    ]
    assert "standard error of 3.0 points" in second
    kinds = [["all tokens", "80.0", "90.0"], ["score", "74.0", "84.0"], ["late", "50.0", "60.0"]]
    assert cells(second) == [*kinds, ["random", "40.0", "50.0"]]
    assert second.endswith("### Real footage\n\n*Not measured yet.*")


def test_ratios_between_whole_percents_are_named_as_they_are() -> None:
    document = world_document()
    for row in document["rows"]:
        row["retention_ratio"] = {0.4: 0.125}.get(row["retention_ratio"], row["retention_ratio"])
        row["achieved_ratio"] = row["retention_ratio"]
    scaling = scaling_document()
    scaling["fit"][1]["retention_ratio"] = 0.125
    for text in (
        BLOCKS["accuracy_summary"].part(document, "accuracy_world.json"),
        BLOCKS["leaderboard"].render({"accuracy_world.json": document}),
        BLOCKS["scaling"].part(scaling, "scaling_x.json"),
    ):
        assert "12.5%" in text
        assert "12%" not in text
