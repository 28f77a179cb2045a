"""Families with structure between their vision tokens, from checkpoint to answer: exact counts at every ratio."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.in_process import InProcess
from benchmarks.serving.process import free_port, running_process
from score_vllm import num_retained_tokens
from score_vllm.client import chat_body, data_url, user_message
from score_vllm.convert_llava_video import convert
from tests.e2e.conftest import API_KEY, SCORE_SERVE, Server, environment
from tests.explained import kept_indices
from tests.integration.tiny_families import build_llava, build_policy, build_qwen3, write_original
from tests.integration.tiny_glm_internvl import build_glm, build_internvl

pytest.importorskip("vllm")
# Cells and structure tokens of the 48-frame clip of 6 seconds. Qwen and GLM read 2 frames a second in cells of two, the
# others all 48 frames. Bytes are tokens here, and a marker stands on each side of a cell.
EXPECTED = {
    "qwen3_vl": (6, 6 * (len("<0.2 seconds>") + 2)),
    "llava_video": (48, 48 * 4),
    "glm4v_moe": (6, 6 * (len("0.0 seconds") + 2)),
    "internvl": (48, sum(len(f"Frame{i}: ") + 2 for i in range(1, 49)) + 47),
    "qwen3_5_moe": (6, 6 * (len("<0.2 seconds>") + 2)),
}
# vLLM's fused experts round differently, and gated delta nets run in bf16 on the CPU.
NOT_EXACT = ("glm4v_moe", "qwen3_5_moe")


@pytest.fixture(scope="module", params=EXPECTED)
def family_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[tuple[str, Server]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    kind = request.param
    dtype = "bfloat16" if kind == "qwen3_5_moe" else "float32"
    if kind == "llava_video":
        options = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
        build_llava(folder / "known", **options)
        write_original(folder / "known", folder / "original")
        convert(folder / "original", model, heads=2)
    else:
        build = {"glm4v_moe": build_glm, "internvl": lambda at, _, dtype: build_internvl(at, dtype)}
        build.get(kind, build_qwen3)(model, kind, dtype)
    build_policy(folder / "policy", json.loads((model / "config.json").read_text())["architectures"][0])
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(SCORE_SERVE), "--model", str(model), "--served-model-name", "tiny", "--policy"]
    command += [str(folder / "policy"), "--host", "127.0.0.1", "--port", str(port), "--api-key", API_KEY]
    command += ["--enforce-eager", "--dtype", dtype, "--max-model-len", "4096"]
    command += ["--log-format", "json"]
    with running_process(command, url, folder / "server.log", environment(cache)) as process:
        yield request.param, Server(url, folder / "server.log", process, folder)


def test_counts_and_answers(family_server: tuple[str, Server], clips: dict[str, Path]) -> None:
    name, server = family_server
    data = base64.b64encode(clips["plain"].read_bytes()).decode()
    video = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    messages: Any = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]
    text_tokens, structure, answers = set(), set(), []
    for ratio in (1.0, 0.4, 0.1, 0.02):
        answer = server.client().chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=4,
            temperature=0,
            extra_body={"retention_ratio": ratio, "score_explain": True},
        )
        (report,) = answer.score["videos"]
        cells, rows, columns = report["grid"]
        assert cells == EXPECTED[name][0]
        assert report["original_tokens"] == cells * rows * columns
        assert report["retained_tokens"] == num_retained_tokens(cells * rows * columns, ratio)
        assert len(kept_indices(report)) == sum(report["kept_per_cell"]) == report["retained_tokens"]
        # Of the clip's 6 seconds: a cell of two frames begins every second, one of one frame every eighth of one.
        assert report["cell_seconds"] == pytest.approx([6 * cell / cells for cell in range(cells)], abs=0.002)
        assert report["frames"] == cells * (1 if name in ("llava_video", "internvl") else 2)
        structure.add(report["structure_tokens"])
        text_tokens.add(answer.usage.prompt_tokens - report["retained_tokens"] - report["structure_tokens"])
        assert answer.choices[0].message.content is not None
        answers.append(answer)
    assert len(text_tokens) == 1, "only the video's tokens may differ between ratios"
    assert structure == {EXPECTED[name][1]}
    check_log(server, answers)


def check_log(server: Server, answers: list[Any]) -> None:
    """``--log-format json``: every line of the log that begins like JSON is JSON, and ours say what the answers do."""
    end = time.monotonic() + 30
    while server.text().count('"request_id"') < len(answers):
        assert time.monotonic() < end, "a request has no line"
        time.sleep(0.05)
    lines = [json.loads(line) for line in server.text().splitlines() if line.startswith("{")]
    assert {line["name"].split(".")[0] for line in lines} >= {"score_vllm", "vllm"}
    ours = {line["request_id"]: line for line in lines if line["name"] == "score_vllm.requests"}
    assert set(ours) == {answer.id for answer in answers}
    for answer in answers:
        (video,) = answer.score["videos"]
        line = ours[answer.id]
        assert (line["levelname"], line["message"], line["status"], line["videos"]) == ("INFO", "request", 200, 1)
        assert line["ratio"] == video["retention_ratio"]
        for name in ("original_tokens", "retained_tokens", "structure_tokens"):
            assert line[name] == video[name]
        assert 0 < line["compressor_ms"] + line["tower_ms"] <= line["prefill_ms"] <= line["total_ms"]


def test_served_answers_are_the_transformers_path_s(family_server: tuple[str, Server], clips: dict[str, Path]) -> None:
    """A file, a question and a ratio, through score-serve and through transformers in this process."""
    name, server = family_server
    if name in ("qwen3_vl", "llava_video"):
        pytest.skip("held to transformers by tests/integration/test_families.py")
    own = InProcess(server.media / "model", server.media / "policy")
    messages = [user_message(data_url(clips["plain"].read_bytes()), "What happens?")]
    for ratio in (1.0, 0.1):
        body = chat_body("tiny", messages, max_tokens=8, retention_ratio=ratio, ignore_eos=True, return_token_ids=True)
        answer = server.client().post("/chat/completions", body=body, cast_to=object)
        usage, (served,) = answer["usage"], answer["score"]["videos"]
        reply = own.answer(body)
        (counts,) = reply.score["videos"]
        assert {key: served[key] for key in counts} == counts
        assert usage["prompt_tokens"] == reply.prompt_tokens
        if name not in NOT_EXACT:
            assert answer["choices"][0]["token_ids"][: len(own.ids)] == own.ids
