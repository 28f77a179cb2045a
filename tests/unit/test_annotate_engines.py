"""The annotator with engines of its own: what is asked, logged, gone on with and refused; the engine is pretended."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:  # found, not imported: that takes seconds of every worker
    pytest.skip("vllm is not installed", allow_module_level=True)
from score_vllm.client import Reply
from score_vllm.models import offline
from score_vllm.models.offline import EngineOptions, OfflineEngine, VideoRefused
from score_vllm.train.annotate import __main__ as cli
from score_vllm.train.annotate import batch

CAPTION = "A bright square slowly crosses the dark ground, seen in {name}."


class PretendedEngine:
    """Answers by a file's name; ``dies_at`` raises at that question."""

    asked: list[list[str]]
    dies_at = ""

    def __init__(self, options: EngineOptions) -> None:
        assert options.model == "demo"

    def ask(self, questions: Sequence[tuple[Path, str]]) -> list[Reply | VideoRefused]:
        names = [path.name for path, _ in questions]
        if self.dies_at in names:
            raise RuntimeError("the engine has died")
        self.asked.append(names)
        return [
            VideoRefused("damaged") if "broken" in name else Reply(CAPTION.format(name=name), "stop", 9, 9, None)
            for name in names
        ]

    def close(self) -> None:
        self.asked.append(["closed"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[PretendedEngine]:
    monkeypatch.setattr(batch, "OfflineEngine", PretendedEngine)
    monkeypatch.setattr(PretendedEngine, "asked", [], raising=False)
    monkeypatch.setattr(PretendedEngine, "dies_at", "")
    return PretendedEngine


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    names = ("a.mp4", "b.mp4", "broken.mp4", "c.mp4", "d.mp4")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"video": str(tmp_path / name), "prompt": "What?"}) + "\n" for name in names))
    made = ["--kind", "jsonl", "--data", str(data), "-o", str(tmp_path / "out.jsonl"), "--model", "demo"]
    return [*made, "--backend", "engine", "--batch", "2", "--quiet"]


def run(*command: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(command))
    return ended.value.code


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batches_are_answered_and_one_bad_file_costs_nobody_else(
    engine: type[PretendedEngine], command: list[str], tmp_path: Path
) -> None:
    assert run(*command) == 1
    assert engine.asked == [["a.mp4", "b.mp4"], ["broken.mp4", "c.mp4"], ["d.mp4"], ["closed"]]
    captions = [row["caption"] for row in rows(tmp_path / "out.jsonl")]
    assert captions == [CAPTION.format(name=f"{name}.mp4") for name in "abcd"]
    (failure,) = rows(tmp_path / "out.failures.jsonl")
    assert (failure["reason"], Path(failure["video"]).name) == ("damaged", "broken.mp4")


def test_it_goes_on_where_the_engine_died(engine: type[PretendedEngine], command: list[str], tmp_path: Path) -> None:
    engine.dies_at = "c.mp4"
    with pytest.raises(RuntimeError, match="the engine has died"):
        cli.main(command)
    engine.dies_at = ""
    engine.asked.clear()
    assert run(*command) == 1
    assert engine.asked == [["broken.mp4", "c.mp4"], ["d.mp4"], ["closed"]]
    engine.asked.clear()
    assert run(*command) == 1
    assert engine.asked == [["broken.mp4"], ["closed"]], "what failed is asked again, and nothing else"
    assert len(rows(tmp_path / "out.jsonl")) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base-url", "http://127.0.0.1:1/v1"], "--base-url belongs to --backend http"),
        (["--engine-args", "[1]"], "--engine-args must be a JSON object, got '[1]'"),
        (["--retention-ratio", "2"], "retention_ratio must be"),
        (["--batch", "0"], "batch must be >= 1, got 0"),
        (["--max-tokens", "0"], "max_tokens must be >= 1, got 0"),
        (["--method", "vidcom2", "--policy", "x"], "do not go together"),
        (["--policy", "/no/such/folder"], "does not exist"),
        (["--model", "nobody"], "--model 'nobody' is no directory"),
        (["--backend", "ray", "--actors", "0"], "--actors must be >= 1, got 0"),
        (["--backend", "http"], "--backend http needs --base-url URL"),
        (["--backend", "http", "--base-url", "http://127.0.0.1:1/v1", "--policy", "x"], "--policy and --method belong"),
    ],
)
def test_wrong_usage(
    more: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    assert run(*command, *more) == 2
    assert message in capsys.readouterr().err


def test_without_ray_its_backend_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert run(*command, "--backend", "ray") == 2
    assert "score-vllm[ray]" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_costs_its_own_answer_alone() -> None:
    engine = OfflineEngine.__new__(OfflineEngine)

    class LLM:
        def generate(self, prompts: list[dict[str, Any]], *_: Any, **__: Any) -> list[Any]:
            if any("long" in prompt["prompt"] for prompt in prompts):
                raise ValueError("the prompt is too long")
            answer = type("Output", (), {"text": "yes", "finish_reason": "stop", "token_ids": [1]})
            return [type("Request", (), {"outputs": [answer], "prompt_token_ids": [1, 2]}) for _ in prompts]

    engine._llm, engine._params = LLM(), None
    answers = engine._generate([{"prompt": text} for text in ("one", "a long one", "two")])
    assert [getattr(answer, "text", str(answer)) for answer in answers] == ["yes", "the prompt is too long", "yes"]
    assert offline.VideoRefused is type(answers[1])
