from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.harness import read_results
from benchmarks.report import load_blocks
from benchmarks.report.footage import _gain
from benchmarks.world import accuracy as world_accuracy
from benchmarks.world import context_rot, footage
from benchmarks.world.accuracy import Candidate, HeldOut
from score_vllm import RetentionPolicy, VideoGrid, demo
from score_vllm.train.world.dinov2 import WIDTH, Features, FootageEncoder
from score_vllm.train.world.footage_items import HELD_OUT
from score_vllm.train.world.question_blocks import PackedBatch
from score_vllm.train.world.reader import ARCHITECTURE, Projector, save_projector


def lucky(logits: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Half of the questions at least, by what an untrained reader makes of them."""
    count = int(packed.owners.max()) + 1
    found = torch.zeros(count).index_add_(0, packed.owners, logits[:, 0])
    return found >= found.median()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Generated footage, an untrained reader of random features, and two policies for it."""

    def encode(self: FootageEncoder, frames: np.ndarray) -> Features:
        x = torch.randn(len(frames), 64, WIDTH, generator=torch.Generator().manual_seed(int(frames.sum())))
        return Features(x.half(), {"frame": x.norm(dim=-1), "patch": x.norm(dim=-1)})

    monkeypatch.setattr(FootageEncoder, "_encode", encode)
    # Nobody has trained this reader: what counts as right is up to its weights and to what it read.
    monkeypatch.setattr(footage, "GATE", -1.0)
    monkeypatch.setattr(world_accuracy, "blocks_right", lucky)
    (tmp_path / "footage" / "backgrounds").mkdir(parents=True)
    for item in HELD_OUT:
        frames = np.random.default_rng(len(item.name)).integers(0, 255, (3, 120, 120, 3), np.uint8)
        np.save(tmp_path / "footage" / "backgrounds" / f"{item.name}.npy", frames)
    demo.build_model(tmp_path / "reader", dtype="float32")
    torch.manual_seed(0)
    projector = Projector(demo.TEXT_CONFIG["hidden_size"])
    projector.mean.fill_(0.5)
    projector.scale.copy_(torch.linspace(0.5, 2, WIDTH))
    save_projector(projector, tmp_path / "reader", {"footage": str(tmp_path / "footage")})
    for seed in (0, 1):
        policy = RetentionPolicy(WIDTH, architecture=ARCHITECTURE, seed=seed)
        policy.save_pretrained(tmp_path / "policies" / f"budget-matched-{seed}" / "policy")
    return tmp_path


def test_the_table_of_real_footage(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = world / "accuracy_footage.json"
    call = ["--benchmark", "footage", "--reader", str(world / "reader"), "--policies", str(world / "policies")]
    call += ["--methods", "random,vidcom2,fastvid", "--ratios", "0.25,0.1", "--clips", "6", "--output", str(output)]
    assert accuracy.main(call) == 0
    document = read_results(output)
    rows = {(row["method"], row["retention_ratio"]): row for row in document["rows"]}
    assert len(rows) == 1 + 2 * 4
    assert set(rows["vanilla", 1.0]["backgrounds"]) == set(document["backgrounds"])
    assert rows["vanilla", 1.0]["blind"]["accuracy"] <= 1
    trained = rows["budget-matched", 0.1]
    assert set(trained["seeds"]) == {"0", "1"}
    assert {"vanilla", trained["best_free"]} == set(trained["against"])
    assert trained["achieved_ratio"] == pytest.approx(0.1, abs=0.001)
    block = load_blocks()["accuracy_footage"]
    text = block.part(document, output.name)
    assert "over the best method without training" in text
    assert "no tokens" in text
    ranked = load_blocks()["leaderboard"].render({output.name: document})
    assert re.search(r"\| *\d \| *budget-matched \| trained, 2 seeds \|", ranked)
    assert "budget-matched" in capsys.readouterr().out


def test_a_reader_that_does_not_look_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "GATE", 0.2)
    with pytest.raises(SystemExit, match="less than 20% apart"):
        accuracy.main(["--benchmark", "footage", "--reader", str(world / "reader"), "--clips", "2"])


def test_more_to_read(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = world / "context_rot.json"
    call = ["x", "--reader", str(world / "reader"), "--policies", str(world / "policies"), "--ratios", "0.25"]
    call += ["--lengths", "1,2", "--strided", "2", "--clips", "2", "--methods", "random", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", call)
    context_rot.main()
    document = read_results(output)
    found = {(row["study"], row["value"]) for row in document["rows"]}
    assert found == {("length", 1), ("length", 2), ("tokens", 2), *(("clutter", c) for c in context_rot.CLUTTER)}
    fewer = [row for row in document["rows"] if row["method"] == "fewer frames"]
    assert [row["tokens"] for row in fewer] == [2048 / stride for stride in context_rot.STRIDES]
    every = next(row for row in fewer if row["retention_ratio"] == 1)
    assert every["against_vanilla"]["difference"] == 0
    assert "2x long" in load_blocks()["context_rot"].part(document, output.name)


def test_paired_differences() -> None:
    grid = VideoGrid(1, 1, 1)
    question = (("kind", "text", "answer"),)
    clips = [HeldOut(torch.zeros(1, 1, 1), {}, grid, question * 4, name) for name in ("a", "a", "b", "b")]
    found = footage.paired(np.array([4, 2, 3, 1]), np.array([2, 2, 1, 1]), clips)
    assert found["difference"] == pytest.approx(100 * 4 / 16)
    # Gains of 50, 0, 50 and 0 points; the same mean on both backgrounds.
    assert found["se_clips"] == pytest.approx(np.std([50, 0, 50, 0], ddof=1) / 2)
    assert found["se_backgrounds"] == 0
    alone = footage.paired(np.array([4, 2]), np.array([2, 2]), clips[:2])
    assert alone["se_backgrounds"] is None, "one background says nothing about others"
    assert _gain(alone) == "+25.0 (25.0, -)"


def test_standardised_tokens_are_scaled_back() -> None:
    x = torch.randn(4, 4, 8)
    clip = HeldOut(x, {}, VideoGrid(4, 2, 2), ())
    mean, scale = torch.randn(8), torch.rand(8) + 0.5
    rows, indices = Candidate("vidcom2", "vidcom2", channels=(mean, scale)).select(clip, 0.5)
    torch.testing.assert_close(rows, x.flatten(0, 1)[indices])


def test_another_ranked_share_is_named_as_it_is(tmp_path: Path) -> None:
    RetentionPolicy(8).save_pretrained(tmp_path / "score-0" / "policy")
    found = world_accuracy.candidates([], tmp_path, 0.025)
    assert [candidate.name for candidate in found] == ["score", "score, best 2.5%"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--clips", "1"), ("--questions", "0"), ("--ranked-share", "1.5"), ("--methods", "uniform,score")],
)
@pytest.mark.parametrize("benchmark", ["world", "footage"])
def test_options_are_checked_before_anything_is_encoded(
    benchmark: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(["--benchmark", benchmark, option, value])
    assert f"argument {option}: must be" in capsys.readouterr().err


def test_what_is_missing_is_named_in_one_sentence(tmp_path: Path) -> None:
    for option, said in (
        ("--reader", "is no reader; to train one: python -m"),
        ("--policies", "has no folder NAME-SEED"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: {option} {tmp_path} {said}"):
            accuracy.main(["--benchmark", "footage", option, str(tmp_path)])


def test_frame_rates_are_compared_at_a_length_that_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--policies", "nowhere", "--lengths", "1,2"])
    with pytest.raises(SystemExit, match="2"):
        context_rot.main()
    assert "--strided must be one of --lengths 1,2, got 4" in capsys.readouterr().err
