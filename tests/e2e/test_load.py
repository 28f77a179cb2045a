"""The load driver's client against the session's server: streamed, checked, counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
from .conftest import API_KEY, ROOT, Server
from .test_serve import ask, chat, data_url

_path = list(sys.path)
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "load")]
try:
    import serving
    from aggregate import aggregate, by_ratio
    from clips import ClipShape, write_clips
    from monitoring import Monitor
    from plan import Target, make_requests, question, run_locust
finally:
    sys.path[:] = _path

# Looked for, not imported: locust would patch this process's sockets.
needs_locust = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
SHAPE = ClipShape(8, 112, 112)


@pytest.fixture
def target(server: Server, tmp_path: Path) -> Target:
    """The session's server, with the token counts of a clip as it reports them itself."""
    (clip,) = write_clips(tmp_path / "first", SHAPE, [10**6])
    answer = chat(server, ask(data_url(clip), text=question(0)), retention_ratio=1.0, max_tokens=1)
    original = answer.score["videos"][0]["original_tokens"]
    return Target(server.url, "demo", original, answer.usage.prompt_tokens - original, API_KEY)


@needs_locust
def test_the_client_streams_mixed_ratios_without_a_failure(server: Server, target: Target, tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", SHAPE, range(6))
    requests = make_requests(target, clips, (1.0, 0.25, 0.1), 6)
    watched = serving.Server("score", server.url, server.log, server.process)
    with Monitor(watched, interval=0.1) as monitor:
        records, cpu = run_locust(target, requests, 2, tmp_path / "run", max_tokens=5, media="data", timeout=120)
    assert [record["error"] for record in records] == [None] * 6
    assert sorted(record["id"] for record in records) == list(range(6))
    row = aggregate(records, 6)
    assert row["failures"] == 0
    assert all(record["ttft"] > 0 and len(record["itl"]) == 4 for record in records)
    assert row["prompt_tokens"] == sum(request["prompt_tokens"] for request in requests)
    assert {name: group["requests"] for name, group in by_ratio(records).items()} == {"0.1": 2, "0.25": 2, "1.0": 2}
    assert cpu > 0
    assert monitor.peak_rss > 1 << 28
    # Locust's own statistics have the custom rows beside the misnamed one.
    statistics = json.loads((tmp_path / "run" / "locust.json").read_text())
    requests_of = {(row["method"], row["name"]): row["num_requests"] for row in statistics}
    for ratio in ("0.1", "0.25", "1"):
        assert requests_of["POST", f"ratio {ratio} (headers)"] == 2
        assert requests_of["TTFT", f"ratio {ratio}"] == requests_of["E2E", f"ratio {ratio}"] == 2
        assert requests_of["ITL", f"ratio {ratio}"] == 8


@needs_locust
def test_what_is_wrong_is_a_failure_and_not_a_number(target: Target, tmp_path: Path) -> None:
    """A wrong count, a refused request and a missing clip: each is recorded, and none of them ends the run."""
    clips = write_clips(tmp_path / "clips", SHAPE, range(4))
    requests = make_requests(target, clips, (0.25,), 4)
    requests[0]["prompt_tokens"] += 1
    requests[1]["retention_ratio"] = 7
    Path(requests[2]["clip"]).unlink()
    records, _ = run_locust(target, requests, 2, tmp_path / "run", max_tokens=2, media="data", timeout=120)
    errors = {record["id"]: record["error"] for record in records}
    assert "tokens instead of" in errors[0]
    assert "status 400" in errors[1]
    assert "FileNotFoundError" in errors[2]
    assert errors[3] is None
    row = aggregate(records, 4)
    assert row["failures"] == 3
