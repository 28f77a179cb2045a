"""``score_explain`` against a running server: right after the first answer, and out of every cache."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from benchmarks.serving.process import free_port
from score_vllm import RetentionPolicy, select_tokens
from score_vllm.demo import ASSETS, demo_clip, demo_model
from score_vllm.video import decode_video
from score_vllm.vision.tower import VisionTower
from score_vllm.viz import cli as viz_cli
from score_vllm.viz.draw import draw
from tests.conftest import SERVED
from tests.explained import kept_indices

from .conftest import API_KEY, ROOT, Server
from .requests_of import ask, chat, data_url, post

OURS = {"cell_seconds", "kept_per_cell", "kept_mask", "kept_missing"}


def check(video: dict[str, Any]) -> list[int]:
    """An entry agrees with itself; the kept flat indices."""
    cells, rows, columns = video["grid"]
    kept = kept_indices(video)
    assert len(kept) == video["retained_tokens"]
    assert video["kept_per_cell"] == np.bincount(np.array(kept) // (rows * columns), minlength=cells).tolist()
    assert video["cell_seconds"][0] == video["first"]
    assert len(video["cell_seconds"]) == cells
    assert sorted(video["cell_seconds"]) == video["cell_seconds"]
    assert video["cell_seconds"][-1] <= video["last"]
    assert "kept_missing" not in video
    return kept


def explain(server: Server, *urls: str, text: str = "What happens?", **fields: Any) -> list[dict[str, Any]]:
    return chat(server, ask(*urls, text=text), score_explain=True, **fields).score["videos"]


@pytest.mark.parametrize("method", SERVED)
def test_every_method_says_what_it_kept(method: str, server: Server, fresh_clip: Path) -> None:
    for ratio in (0.1, 0.5, 1.0):
        (video,) = explain(server, data_url(fresh_clip), retention_ratio=ratio, retention_method=method)
        check(video)


def test_it_is_what_the_policy_keeps(server: Server) -> None:
    """Of the sample clip, with transformers' tower; in bf16 a few ranks near the threshold may change places."""
    (video,) = explain(server, data_url(demo_clip()), retention_ratio=0.1)
    served = check(video)
    tower = VisionTower(demo_model())
    x, grid = tower.encode(decode_video(demo_clip().read_bytes()).frames)
    assert [grid.t, grid.h, grid.w] == video["grid"]
    policy = RetentionPolicy.from_pretrained(ASSETS / "policy")
    ours = select_tokens(x, 0.1, policy=policy, grid=grid).indices.tolist()
    assert len(set(ours) & set(served)) >= 0.9 * len(ours)


def test_out_of_every_cache(server: Server, fresh_clip: Path) -> None:
    """The first answer is not explained; the same question hits the prefix cache, another one the encoder cache."""
    url = data_url(fresh_clip)
    plain = chat(server, ask(url), retention_ratio=0.3)
    assert not OURS & set(plain.score["videos"][0])
    off = chat(server, ask(url), retention_ratio=0.3, score_explain=False)
    assert not OURS & set(off.score["videos"][0])
    (same,) = explain(server, url, retention_ratio=0.3)
    (other,) = explain(server, url, text="Which colours are there?", retention_ratio=0.3)
    assert check(same) == check(other)
    (less,) = explain(server, url, retention_ratio=0.1)
    assert set(check(less)) < set(check(same)), "the best tenth is among the best three"


def test_two_videos_and_a_window(server: Server, clips: dict[str, Path]) -> None:
    urls = [data_url(clips["plain"]), data_url(clips["odd"])]
    one, other = explain(server, *urls, retention_ratio=[0.5, 0.2], video_start=[2, None], video_end=[4, None])
    check(one)
    check(other)
    assert one["cell_seconds"][0] >= 2


def test_a_stream_says_it_in_its_last_chunk(server: Server, fresh_clip: Path) -> None:
    answer = chat(
        server, ask(data_url(fresh_clip)), retention_ratio=0.25, stream=True, max_tokens=6, score_explain=True
    )
    first, *chunks, last = answer
    assert not any("score" in (chunk.model_extra or {}) for chunk in chunks)
    (early,), (late,) = first.score["videos"], last.score["videos"]
    assert early == {name: value for name, value in late.items() if name not in OURS}, "said once, and the same"
    assert early["encoded_cells"] == early["grid"][0]
    check(last.score["videos"][0])
    whole = chat(server, ask(data_url(fresh_clip)), retention_ratio=0.25, max_tokens=6, score_explain=True)
    (one,), (other,) = last.score["videos"], whole.score["videos"]
    assert {name: one.get(name) for name in OURS} == {name: other.get(name) for name in OURS}


@pytest.mark.parametrize("bad", ["yes", 1, 0, "true", ["a"], {}])
def test_other_values_are_refused(bad: Any, server: Server, clips: dict[str, Path]) -> None:
    body = {"model": "demo", "messages": ask(data_url(clips["plain"])), "score_explain": bad}
    status, answer = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert answer["error"]["param"] == "score_explain"
    assert "score_explain must be true or false, got" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["explain", "scoreExplain", "score-explain", "score_explained"])
def test_near_misses_are_refused(name: str, server: Server, clips: dict[str, Path]) -> None:
    status, answer = post(
        server, "/v1/chat/completions", {"model": "demo", "messages": ask(data_url(clips["plain"])), name: True}
    )
    assert status == 400
    assert "did you mean 'score_explain'" in answer["error"]["message"]


def test_where_nothing_is_selected_it_is_refused(server: Server, clips: dict[str, Path]) -> None:
    messages = ask(data_url(clips["plain"]))
    for path, body in {
        "/tokenize": {"messages": messages},
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions/batch": {"messages": [messages]},
    }.items():
        status, answer = post(server, path, {"model": "demo", "score_explain": True, **body})
        assert status == 400, path
        assert answer["error"]["param"] == "score_explain"
    assert post(server, "/tokenize", {"model": "demo", "prompt": "hi", "score_explain": True})[0] == 400


def test_a_question_without_video(server: Server) -> None:
    assert chat(server, [{"role": "user", "content": "Hello"}], score_explain=True).score["videos"] == []


def test_example_of_the_serving_page(server: Server, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "score_explain" in block)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('api_key="none"', f'api_key="{API_KEY}"')
    shutil.copy(demo_clip(), tmp_path / "clip.mp4")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("102 ["), done.stderr
    per_cell, seconds = re.fullmatch(r"102 (\[.*\]) (\[.*\])\n", done.stdout).groups()  # type: ignore[union-attr]
    assert (len(json.loads(per_cell)), sum(json.loads(per_cell))) == (16, 102)
    assert json.loads(seconds) == [float(second) for second in range(16)]


def test_score_viz_shows_what_a_server_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's mask and frames are what is drawn; ratio and window are asked for, or left to it."""
    drawn: list[Any] = []
    monkeypatch.setattr(
        viz_cli, "draw", lambda *args, **options: drawn.append((args, options)) or draw(*args, **options)
    )
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    clip, out = str(demo_clip()), tmp_path / "out.png"
    viz_cli.main([clip, "--server", server.url, "-o", str(out)])
    (video,) = explain(server, data_url(demo_clip()))
    ((_, frames, grid, selections), options) = drawn.pop()
    assert [grid.t, grid.h, grid.w] == video["grid"]
    assert list(selections) == ["score at 0.1"]
    assert selections["score at 0.1"].indices.tolist() == check(video)
    assert options["times"] == video["cell_seconds"]
    assert np.array_equal(frames, decode_video(demo_clip().read_bytes()).frames[::2])
    assert out.stat().st_size > 1000
    methods = ["--method", "uniform,evs", "--retention", "0.25", "--start", "4", "--end", "8", "--fps", "4"]
    viz_cli.main([clip, "--server", f"{server.url}/v1/", "--model", "demo", *methods, "-o", str(tmp_path / "out.mp4")])
    ((_, frames, grid, selections), options) = drawn.pop()
    assert list(selections) == ["uniform at 0.25", "evs at 0.25"]
    assert (len(frames), grid.t, options["times"][0]) == (8, 8, 4.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-key", "wrong"], "HTTP 401"),
        (["--method", "cacovid"], "retention_method must be one of"),
        (["--max-frames", "1000"], r"video_max_frames must be an integer in \[1, 128\]"),
        (["--model", "other"], "HTTP 404"),
        (["--policy", "somewhere"], "--policy is the server's own business with --server"),
        (["--thinning", "octave"], "--thinning is the server's own business"),
    ],
)
def test_score_viz_says_why_there_is_no_picture(
    argv: list[str], message: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    with pytest.raises(SystemExit, match=f"score-viz: error: .*{message}"):
        viz_cli.main([str(demo_clip()), "--server", server.url, "-o", str(tmp_path / "out.png"), *argv])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:{free}"])
def test_score_viz_without_a_server(url: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="score-viz: error: "):
        viz_cli.main([str(demo_clip()), "--server", url.format(free=free_port()), "-o", str(tmp_path / "out.png")])
