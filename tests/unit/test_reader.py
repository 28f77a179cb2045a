from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import check_results
from score_vllm import demo
from score_vllm.train.data.sample import TrainingSample
from score_vllm.train.schema import MissingError
from score_vllm.train.world import reader_stage, vlm
from score_vllm.train.world.dinov2 import WIDTH, Features, FootageEncoder
from score_vllm.train.world.footage_items import ITEMS
from score_vllm.train.world.language_stage import Words, forward
from score_vllm.train.world.reader import (
    ARCHITECTURE,
    FootageVLM,
    Projector,
    is_reader,
    record_of,
    save_projector,
)


def fake_encode(self: FootageEncoder, frames: np.ndarray) -> Features:
    """Features that depend on every frame: mean colour of each patch, through a fixed matrix."""
    tiles = torch.from_numpy(frames).float().view(len(frames), 8, 14, 8, 14, 3).mean((2, 4)).flatten(1, 2) / 255
    mix = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    x = (tiles @ mix).half()
    return Features(x, {"frame": x.float().norm(dim=-1), "patch": x.float().norm(dim=-1)})


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(FootageEncoder, "_encode", fake_encode)
    folder = tmp_path / "reader"
    demo.build_model(folder, dtype="float32", seed=1)
    torch.manual_seed(0)
    projector = Projector(demo.TEXT_CONFIG["hidden_size"])
    projector.scale.fill_(2.0)
    save_projector(projector, folder, {"footage": str(tmp_path / "footage")})
    return folder


def test_the_engine_reads_clips_as_the_reader_was_trained_to(reader: Path) -> None:
    engine = FootageVLM.from_pretrained(reader)
    assert isinstance(engine, FootageVLM)
    assert (engine.hidden_size, engine.architecture) == (WIDTH, ARCHITECTURE)
    assert FootageVLM.tokens_of(FootageVLM.config_of(reader)) == (WIDTH, ARCHITECTURE)
    frames = np.random.default_rng(0).integers(0, 255, (16, 112, 112, 3), np.uint8)
    encoded = engine.encode(TrainingSample("a", frames, 2.0, "What came?", "A red circle moves left."))
    assert encoded.x.shape == (16, 64, WIDTH), "policies see the encoder's tokens, not the projector's"
    kept = [torch.arange(1024), torch.randperm(1024)[:100].sort().values, torch.arange(0)]
    found = engine.cross_entropy(encoded, kept)
    words = Words(engine.tokenizer)
    block = words.block("What came?", "A red circle moves left.")
    for k, value in zip(kept, found, strict=True):
        rows = encoded.x.flatten(0, 1)[k]
        with torch.no_grad():
            logits, packed = forward(
                engine.model, words, encoded.grid, [rows], [k], [[block]], project=engine.projector, t_factor=1.0
            )
        expected = torch.nn.functional.cross_entropy(logits, packed.targets)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert len({round(float(v), 4) for v in found}) == 3


def test_where_a_token_stands_is_in_its_row() -> None:
    projector, grid = Projector(32), reader_stage.VideoGrid(2, 8, 8)
    x = torch.randn(1, WIDTH).expand(128, WIDTH)
    rows = projector(x, torch.arange(128), grid)
    assert torch.equal(rows[:64], rows[64:]), "time is in the positions"
    assert len(rows[:64].unique(dim=0)) == 64


def test_another_folder_is_no_reader(tmp_path: Path) -> None:
    assert not is_reader(tmp_path)
    with pytest.raises(MissingError, match="is no reader"):
        FootageVLM(None, tmp_path)


@pytest.mark.parametrize("main", [reader_stage.main, vlm.main])
def test_what_no_such_training_made_is_not_replaced(
    main: Callable[[list[str]], int | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    note = folder / "config.json"  # somebody's model
    note.write_text("mine")
    for output in (folder, note):
        with pytest.raises(SystemExit, match="2"):
            sys.exit(main(["--output", str(output)]))
        assert "exists and is not from an earlier run" in capsys.readouterr().err
    assert note.read_text() == "mine"


def test_mistakes_are_told_before_anything_is_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert reader_stage.main([*output, "--reader-from", str(tmp_path)]) == 2
    assert f"--reader-from {tmp_path} is no reader" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        reader_stage.main([*output, "--clips", "0"])
    assert "argument --clips: must be an integer >= 1, got '0'" in capsys.readouterr().err


def test_a_checkpoint_behind_a_link_is_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / vlm.RECORD).write_text("old")
    link.symlink_to(folder)
    with vlm.replaced(link, vlm.RECORD) as staging:
        staging.mkdir()
        (staging / vlm.RECORD).write_text("new")
    assert (folder / vlm.RECORD).read_text() == "new"
    assert link.is_symlink()


def test_training_a_reader_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FootageEncoder, "_encode", fake_encode)
    monkeypatch.setattr(reader_stage, "CORPUS", 50)
    footage, output = tmp_path / "footage", tmp_path / "out" / "reader"
    call = ["--output", str(output), "--footage", str(footage), "--clips", "8", "--validation", "2"]
    call += ["--steps", "3", "--projector-steps", "2"]
    assert reader_stage.main(call) == 2
    assert "footage --output" in capsys.readouterr().err
    (footage / "backgrounds").mkdir(parents=True)
    for item in ITEMS:
        frames = np.random.default_rng(len(item.name)).integers(0, 255, (4, 144, 160, 3), np.uint8)
        np.save(footage / "backgrounds" / f"{item.name}.npy", frames)
    output.parent.mkdir()
    # Three steps do not make a reader, and the gate says so; what was trained is there to be looked at.
    assert reader_stage.main(call) == 1
    assert "above none" in capsys.readouterr().err
    record = record_of(output)
    assert not record["passed"]
    assert check_results({"environment": {"machine": "m"}, "rows": [record]}), "benchmarks store it among their results"
    assert record["validation_accuracy"].keys() == {"1.0", "0.25", "0.1", "0.0"}
    engine = FootageVLM.from_pretrained(output)
    assert (engine.projector.scale > 0).all()
    assert [path.name for path in output.parent.iterdir()] == ["reader"], "nothing is left beside it"
