"""How the API process asks for selections: over all engines and workers, and what it says where none answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("vllm")
from score_vllm import VideoGrid
from score_vllm.config import ServingConfig
from score_vllm.models.processing import VideoReport, VideoSpec
from score_vllm.models.video_options import VideoOptions
from score_vllm.server import explain
from score_vllm.server.context import RequestContext, ServerState
from tests.explained import explained

GRID = VideoGrid(2, 2, 2)
FOUND = explained([0, 5], GRID)
SPEC = VideoSpec(0.25, "uniform", VideoOptions())


class EngineClient:
    """Two engines of two workers; each holds what its dict says."""

    def __init__(self, *workers: dict[str, Any] | Exception) -> None:
        self.engine_core, self.workers, self.calls = self, workers, []

    async def call_utility_all_async(self, *call: Any) -> list[list[Any]]:
        self.calls.append(call)
        answers = []
        for worker in self.workers:
            if isinstance(worker, Exception):
                raise worker
            answers.append([worker.get(key) for key in call[3][0]])
        return [answers[:2], answers[2:]]


def report(identity: str, times: list[float] | None = None) -> VideoReport:
    return VideoReport(GRID, 2, SPEC, 2, times=times, identity=identity)


def score(client: EngineClient, *reports: VideoReport, asked: bool = True) -> dict[str, Any]:
    context = RequestContext(0.25, None, explain=asked, reports=list(reports))
    state = ServerState(ServingConfig(1.0, "uniform"), None, engine_client=client)
    return asyncio.run(explain.explained(context.score(state.serving), state, context))


def test_whichever_engine_and_worker_holds_a_selection() -> None:
    for place in range(4):
        workers: list[Any] = [{}, {}, {}, {}]
        workers[place] = {"a": FOUND}
        client = EngineClient(*workers)
        one, other = score(client, report("a", [0.0, 0.5, 1.0]), report("b"))["videos"]
        assert {name: one[name] for name in FOUND} == FOUND
        assert one["cell_seconds"] == [0.0, 1.0], "three frames in cells of two"
        assert "kept_missing" not in one
        assert (other["kept_mask"], other["kept_per_cell"], other["cell_seconds"]) == (None, None, None)
        assert "no worker holds this selection any more" in other["kept_missing"]
        assert client.calls == [("collective_rpc", "score_selections", None, (["a", "b"],), None)]


def test_an_engine_that_fails_costs_the_explanation_not_the_answer() -> None:
    (video,) = score(EngineClient({"a": FOUND}, RuntimeError("dead"), {}, {}), report("a"))["videos"]
    assert video["kept_mask"] is None
    assert "did not answer" in video["kept_missing"]


def test_an_engine_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(explain, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(EngineClient, "call_utility_all_async", forever)
    (video,) = score(EngineClient(), report("a"))["videos"]
    assert "did not answer" in video["kept_missing"]


def test_nobody_is_asked_where_nothing_is_asked_for() -> None:
    client = EngineClient({"a": FOUND})
    (video,) = score(client, report("a"), asked=False)["videos"]
    assert not {"kept_mask", "kept_per_cell", "cell_seconds", "kept_missing"} & set(video)
    assert score(client)["videos"] == []
    assert client.calls == []
