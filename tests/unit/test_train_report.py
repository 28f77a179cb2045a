"""The page about a training: what it measures on toys whose values are known, and that it is one whole HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from score_vllm import RetentionPolicy
from score_vllm.train.checkpoint import TrainState, save_checkpoint
from score_vllm.train.config import TrainSettings, load_settings
from score_vllm.train.data.config import CompositeConfig
from score_vllm.train.data.sample import AskingSource, BrokenSampleError
from score_vllm.train.data.sources import MixedSource, open_source, source_config
from score_vllm.train.frozen.model import AnsweringEngine, EncodedSample
from score_vllm.train.report import write
from score_vllm.train.report.charts import Line, binned, chart, round_numbers
from score_vllm.train.report.clips import ReportSource, _unseen, open_report_source, read_clips
from score_vllm.train.report.history import read_history
from score_vllm.train.report.measure import ALL, METHODS, NONE, RATIOS, Findings, measure
from score_vllm.train.report.page import paired, verdicts
from score_vllm.train.report.write import write_report
from score_vllm.train.tracking import RunLog
from score_vllm.viz.draw import contact_sheet
from tests.integration.train_toy import WIDTH, ToyEngine, ToySource, write_config

VOID = {"meta", "img", "source", "br", "path", "circle"}


class Asked(ToySource):
    """A toy with two questions about every clip; the second has no answer that the toy knows."""

    def questions(self, index: int) -> list[tuple[str, str, str]]:
        return [("kind", "Known?", "yes"), ("kind", "Unknown?", "no"), ("kind", "Left out?", "no")]


class Answering(ToyEngine):
    """Right where the question is known and a token is kept."""

    def with_text(self, encoded: EncodedSample, prompt: str, target: str) -> EncodedSample:
        return EncodedSample(
            f"{encoded.key}", encoded.x, encoded.layout, encoded.prefix, encoded.suffix, torch.tensor([target == "yes"])
        )

    def answers_right(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([bool(encoded.target[0]) and len(k) > 0 for k in kept])


def the_best(width: int = WIDTH) -> RetentionPolicy:
    """Ranks the toy's important tokens, marked in their first channel, first."""
    policy = RetentionPolicy(width, 4, use_residual=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy.w_in[:, 0] = 1.0
        policy.w_out.fill_(1.0)
    return policy


def settings_of(folder: Path, *overrides: str) -> TrainSettings:
    return load_settings(write_config(folder), overrides)


def measured(source: ToySource, engine: ToyEngine, folder: Path, clips: int = 6) -> Findings:
    found = read_clips(source, settings_of(folder).stages[-1], engine, clips, 2)
    return measure(found, engine, the_best(), pictures=2, seen=False)


def test_the_policy_is_measured_beside_the_baselines(tmp_path: Path) -> None:
    found = measured(Asked(broken=(0, 1, 2)), Answering(), tmp_path)
    assert found.clips == 6
    assert found.cross_entropy[ALL] == [1.0] * 6
    assert found.cross_entropy[NONE] == [1.5] * 6
    # 16 of 64 tokens matter: a quarter holds nearly all of them (marks overlap), a tenth 6.
    assert max(found.cross_entropy["score", 0.25]) < 1.1
    assert found.cross_entropy["score", 0.1] == pytest.approx([1 + 0.5 * 10 / 16] * 6)
    assert all(len(found.cross_entropy[m, r]) == 6 for m in METHODS for r in RATIOS)
    assert min(found.cross_entropy["uniform", 0.25] + found.cross_entropy["random", 0.25]) > 1.2
    assert found.questions == 12
    assert found.accuracy["score", 0.1] == [0.5] * 6
    assert found.accuracy[NONE] == [0.0] * 6
    assert found.over_time["score"].mean() / 6 == pytest.approx(6 / 64, abs=0.03)
    assert len(found.sheets) == 2
    assert isinstance(Answering(), AnsweringEngine)
    assert not isinstance(ToyEngine(), AnsweringEngine)
    assert not measured(ToySource(), ToyEngine(), tmp_path).accuracy
    assert not measured(Asked(), ToyEngine(), tmp_path).accuracy, "an engine that answers nothing is not asked"


def test_pictures_say_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []

    def sheet(frames: np.ndarray, *args: Any, times: np.ndarray, **kwargs: Any) -> np.ndarray:
        drawn.append(times)
        return contact_sheet(frames, *args, times=times, **kwargs)

    monkeypatch.setattr("score_vllm.train.report.measure.contact_sheet", sheet)
    source = ToySource()
    measured(source, ToyEngine(), tmp_path, clips=2)
    assert drawn
    step = 1 / source[0].fps
    assert all(times[0] == 0 and np.allclose(np.diff(times), step) for times in drawn)


def test_differences_are_paired_and_called_only_when_clear() -> None:
    assert paired([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) == (-0.5, 0.0)
    assert paired([1.0], [2.0]) == (-1.0, None)
    found = Findings(False)
    for method in METHODS:
        for ratio in RATIOS:
            found.cross_entropy[method, ratio] = [1.0, 2.0, 3.0, 4.0]
    found.cross_entropy[ALL] = [1.0] * 4
    found.cross_entropy["score", 0.4] = [0.5, 1.4, 2.5, 3.6]
    found.cross_entropy["uniform", 0.25] = [0.5, 1.4, 2.5, 3.6]
    found.cross_entropy["random", 0.1] = [0.0, 3.5, 1.5, 4.9]
    ahead, behind, level, _ = verdicts(found)
    assert "ahead of the best baseline" in ahead
    assert "behind the best baseline here, uniform (+0.500 ± 0.041)" in behind
    assert "level with the best baseline here, random" in level


class Whole(HTMLParser):
    """Checks that tags close, and collects what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "srcset", "href", "style", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def a_run(settings: TrainSettings, steps: int = 400) -> None:
    """A finished run of ``steps``, as the trainer leaves it."""
    output = Path(settings.output)
    log = RunLog(output / "log.jsonl")
    log.write("started", 0, time="2026-01-01T00:00:00Z")
    for step in range(1, steps + 1):
        stage = "warmup" if step < 100 else "main"
        values = {"loss": 1 / step, "ce": 2.0, "ce_base": 1.5, "sparsity": 0.9, "entropy": float("nan"), "lr": 1e-3}
        log.write("step", step, stage=stage, broken_samples=0, **values)
    log.write("finished", steps)
    log.close()
    the_best().save_pretrained(output / "policy", config_digest="abc", versions={"torch": "<2>"})


def test_the_page_is_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)
    a_run(settings)
    monkeypatch.setattr(write, "open_report_source", lambda *_: ReportSource(Asked(), seen=False))
    said = write_report(settings, settings.stages[-1], Answering(), 2)
    assert "measured 11 clips" in said[0]
    assert "report.html" in said[-1]
    text = (tmp_path / "run" / "report.html").read_text()
    found = Whole(text)
    assert found.links
    assert all(link.startswith("data:image/webp;base64,") for link in found.links)
    assert not re.search(r"https?://|@import|<script", text)
    for word in ("Learning rate", "warmup", "vidcom2", "policy digest", the_best().digest(), "<2>", '"group_size": 16'):
        assert word in found.words, word
    assert "Entropy" not in found.words, "nothing was logged of it"
    assert text.count("<circle") >= 2 * len(METHODS) * len(RATIOS)
    assert not list((tmp_path / "run").glob(".report*"))
    assert len(text) < 1_000_000


def test_what_cannot_be_measured_leaves_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path)
    a_run(settings)
    monkeypatch.setenv("TOY_CRASH", "1")
    monkeypatch.setattr(write, "open_report_source", lambda *_: ReportSource(ToySource(), seen=False))
    write_report(settings, settings.stages[-1], ToyEngine(), 2)
    words = Whole((tmp_path / "run" / "report.html").read_text()).words
    assert "a shape is wrong, on purpose" in words
    assert "Learning rate" in words
    assert "Beside the baselines" not in words
    assert "measures nothing" in caplog.text
    write_report(settings_of(tmp_path, "report.clips=0"), settings.stages[-1], ToyEngine(), 2)
    words = Whole((tmp_path / "run" / "report.html").read_text()).words
    assert "could be" not in words, "nothing was asked for"
    for missing in ("log.jsonl", "policy/config.json"):
        (tmp_path / "run" / missing).unlink()
    write_report(settings, settings.stages[-1], None, 2)


def test_history_is_of_the_newest_run_without_its_pauses(tmp_path: Path) -> None:
    rows = [
        {"event": "step", "step": 9, "time": 0},
        {"event": "started", "step": 0, "time": "2026-01-01T00:00:00Z"},
        {"event": "step", "step": 1, "time": 110, "stage": "a"},
        {"event": "stopped by a signal", "step": 1, "time": 111},
        {"event": "resumed", "step": 1, "time": "2026-01-02T00:00:00Z"},
        {"event": "step", "step": 2, "time": 5020, "stage": "a"},
        {"event": "failed", "step": 2, "time": 5021, "diagnosis": "the policy has collapsed"},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "st')
    found = read_history(path)
    assert [row["step"] for row in found.steps] == [1, 2]
    assert found.seconds == 1 + 1
    assert found.diagnosis == "the policy has collapsed"
    assert read_history(tmp_path / "none").steps == []


def test_charts_bin_and_scale() -> None:
    line = binned("a", range(1000), [float(i % 10) for i in range(1000)], "c1")
    assert len(line.points) <= 80
    assert line.points[0][1] == pytest.approx(48 / 13)
    assert line.band[1] == (0.0, 9.0)
    assert binned("a", [1, 2, 3], [1.0, None, 3.0], "c1").points == [(1, 1.0), (3, 3.0)]
    assert round_numbers(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert round_numbers(-3e-5, 1e-5)[0] == -3e-5
    assert chart("nothing", [Line("a", [], "c1")], "x") == ""
    for points in ([(1.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)], [(0.05, -1e-9), (0.4, 1e9)]):
        drawn = chart("<b>", [Line('"', points, "c1", dots=True)], "x", log_x=True)
        assert "nan" not in drawn
        assert "<b>" not in drawn
        Whole(drawn)


def test_clips_are_of_a_split_that_training_did_not_see(tmp_path: Path) -> None:
    world = settings_of(tmp_path)
    found = open_report_source(world, world.stages[-1], 2)
    assert not found.seen
    composite = _unseen(source_config(kind="composite", split="policy"))
    assert isinstance(composite, CompositeConfig)
    assert composite.split == "report"
    assert found.samples[3].key.startswith("world:report:")
    assert isinstance(found.samples, AskingSource)
    assert {kind for kind, _, _ in found.samples.questions(3)}
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"video": f"{n}.mp4", "caption": "one two three"} for n in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (tmp_path / "run.toml").read_text().replace('kind = "world"', f'kind = "jsonl"\npath = "{folder}/a.jsonl"')
    (tmp_path / "files.toml").write_text(config)
    for held_out, seen in ((0.3, False), (0.0, True)):
        settings = load_settings(tmp_path / "files.toml", [f"stage.main.sources.0.held_out={held_out}"])
        found = open_report_source(settings, settings.stages[-1], 2)
        trained = open_source(settings.stages[-1].sources[0])
        assert found.seen == seen
        assert (len(found.samples) + len(trained) == 40) != seen
    with pytest.raises(BrokenSampleError):
        found.samples[0]
    assert list(read_clips(found.samples, settings.stages[-1], ToyEngine(), 3, 1)) == []


def test_a_mixture_asks_what_its_sources_ask() -> None:
    world, pseudo = (open_source(source_config(kind=kind, limit=30)) for kind in ("world", "world-pseudo"))
    both = MixedSource([world, ToySource(30), pseudo], [1, 1, 1])
    asked = {both.locate(index)[0]: len(both.questions(index)) for index in range(30)}
    assert asked[0] > 3
    assert asked[1] == asked[2] == 0


def test_command_line_of_an_existing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from score_vllm.train.report.__main__ import main

    assert main([str(tmp_path)]) == 2
    assert "no checkpoints" in capsys.readouterr().err
    settings = settings_of(tmp_path)
    a_run(settings, 3)
    state = TrainState(3, "main", 1, 1, 0, settings.to_dict(), {}, {})
    save_checkpoint(tmp_path / "run" / "checkpoints", the_best().state_dict(), {}, state, 1)
    asked = []
    monkeypatch.setattr("score_vllm.train.report.__main__.make_engine", lambda *_: ToyEngine())
    monkeypatch.setattr(
        "score_vllm.train.report.__main__.FrozenVLM.config_of", lambda *_: SimpleNamespace(vision_config=None)
    )
    monkeypatch.setattr("score_vllm.train.report.__main__.model_path", lambda *_: "toy")
    monkeypatch.setattr(write, "open_report_source", lambda *_: asked.append(1) or ReportSource(ToySource(), seen=True))
    assert main([str(tmp_path / "run"), "--clips", "4"]) == 0
    assert asked
    assert "measured 4 clips that training saw, too" in capsys.readouterr().out
