"""A folder of videos to a policy in one command, on the demo model and on random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from score_vllm import RetentionPolicy
from score_vllm.demo import demo_clip
from score_vllm.train import own_clips
from score_vllm.train.__main__ import main
from score_vllm.train.annotate.log import write_lines
from score_vllm.train.data.pseudo import repeat_counts
from score_vllm.train.data.sources import open_source, source_config
from score_vllm.train.schema import ConfigurationError
from score_vllm.train.world.render import render, write_clip
from score_vllm.train.world.scenes import make_clip

CONFIG = Path(__file__).resolve().parents[2] / "train" / "configs" / "own_clips.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips, one of them below another folder, and a file that is no video."""
    root = tmp_path_factory.mktemp("videos")
    (root / "more").mkdir()
    for i in range(4):
        frames = render(make_clip("own", i)[0]).frames[:8]
        write_clip(frames, root / ("more" if i == 3 else "") / f"clip {i}.mp4")
    shutil.copy(demo_clip(), root / "demo.mp4")
    (root / "broken.mp4").write_bytes(b"no video at all")
    (root / "notes.txt").write_text("not a video")
    return root


def run(folder: Path, output: Path, *more: str, flags: Sequence[str] = ()) -> int:
    changes = [
        f"clips={folder}",
        f"output={output}",
        "model.device=cpu",
        "model.dtype=float32",
        "captions.max_tokens=40",
        "captions.stills=1",
        "rollout.group_size=4",
        "optimizer.samples_per_step=1",
        "stage.steps=2",
        "stage.main.sources.0.max_frames=8",
        "stage.main.sources.0.max_pixels=50176",
        "stage.warmup.sources.0.max_pixels=50176",
        "optimizer.schedule=constant",
        "tracking.progress=false",
        "report.pictures=1",
        *more,
    ]
    return main(["--config", str(CONFIG), *flags, *[word for change in changes for word in ("--set", change)]])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("model", ["demo", "random"])
def test_a_folder_of_clips_becomes_a_policy(
    model: str,
    folder: Path,
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    extra = [] if model == "demo" else [f"model.path={tiny_model}"]
    assert run(folder, output, *extra) == 0
    said = capsys.readouterr().out
    assert said.index("estimate from") < said.index("clips    4 to train on, 1 held out, 1 unreadable")
    assert "GiB of memory" in said
    assert "broken.mp4" in said
    assert "this policy" in said
    clips, stills = (lines(output / "captions" / f"{name}.jsonl") for name in ("clips", "stills"))
    assert len(clips) == len(stills) == 4
    assert len({row["video"] for row in clips}) == 4
    if model == "demo":
        assert sum("moves" in row["caption"] or "stays" in row["caption"] for row in clips) >= 3, "it knows its world"
    policy = RetentionPolicy.from_pretrained(output / "policy")
    assert policy.config.provenance["steps"] == 4
    (held_out,) = lines(output / "captions" / "held_out.jsonl")
    assert held_out["video"] not in {row["video"] for row in clips}
    assert "measured 1 clips, cross" in said
    page = (output / "report.html").read_text()
    assert Path(held_out["video"]).name in page
    assert "clips that training did not use" in page
    # Nothing is described twice: a run that goes on only reads what is known.
    monkeypatch.setattr(own_clips.ClipDescriber, "_ask", None)
    monkeypatch.setattr("score_vllm.train.__main__.estimate", lambda *_: [])
    assert run(folder, output, *extra) == 2, "another run is not overwritten"
    assert "--resume" in capsys.readouterr().err
    assert run(folder, output, *extra, "stage.main.steps=3", flags=["--resume"]) == 0
    assert RetentionPolicy.from_pretrained(output / "policy").config.provenance["steps"] == 5


def test_a_cut_description_is_made_again(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    output = tmp_path / "run"
    asked: list[str] = []

    class Describer(own_clips.ClipDescriber):
        def _ask(self, path: Path, what: str, *rest: Any) -> str:
            asked.append(f"{path.name} {what}")
            return super()._ask(path, what, *rest)

    settings, engine = own_settings(folder, output, tiny_model)
    paths = own_clips.find_clips(str(folder))
    found, unreadable = Describer(settings, engine).describe(paths, paths[:1])
    assert [p.name for p in unreadable] == ["broken.mp4"]
    assert len(found) == 5
    before = len(asked)
    log = output / "captions" / "log-0.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]) + '{"key": "cut he')
    again, _ = Describer(settings, engine).describe(paths, paths[:1])
    assert len(asked) == before + 1
    assert again == found


def own_settings(folder: Path, output: Path, model: Path) -> Any:
    from score_vllm.train.config import load_settings
    from score_vllm.train.frozen.model import FrozenVLM

    changes = [f"clips={folder}", f"output={output}", "captions.max_tokens=8", "captions.stills=1"]
    changes += ["stage.main.sources.0.max_frames=4", "stage.main.sources.0.max_pixels=12544", "tracking.progress=false"]
    return load_settings(CONFIG, changes), FrozenVLM.from_pretrained(model)


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(empty, tmp_path / "run") == 2
    assert f"clips '{empty}' holds 0 videos (.mp4, .mkv, .webm, .mov, .avi), at least 4" in capsys.readouterr().err
    assert run(tmp_path / "gone", tmp_path / "run") == 2
    assert "is not a folder" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(4):
        shutil.copy(folder / "broken.mp4", broken / f"{i}.mp4")
    assert run(broken, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "only 0 of 4 videos can be used, at least 4 are needed" in said
    assert "3.mp4" in said
    assert run(folder, tmp_path / "run", "model.shard=fsdp") == 2
    assert "model.shard = 'fsdp'" in capsys.readouterr().err


def test_check_says_what_is_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIG), "--check", "--set", f"clips={folder}", "--set", f"output={tmp_path}"]
    assert main(arguments) == 0
    assert f"6 videos in {folder}" in capsys.readouterr().out


def test_stills_become_clips(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (56, 28), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    file = tmp_path / "stills.jsonl"
    write_lines(file, [{"image": f"{i}.png", "caption": f"shade {i}"} for i in range(5)])
    source = open_source(source_config(kind="stills", path=str(file), split="all"), 2)
    for i in range(5):
        sample = source[i]
        prompt, target = source.text(i)
        assert (sample.prompt, sample.target) == (prompt, target)
        assert target.startswith(f"shade {i}")
        shades = sample.frames[:, 0, 0, 0] // 40
        assert [f"shade {s}" for s in dict.fromkeys(shades.tolist())] == target.split("\n")
        assert all((shades == s).sum() in repeat_counts(2) for s in set(shades.tolist()))
    write_lines(file, [{"image": "../x.png", "caption": "x"}])
    with pytest.raises(ConfigurationError, match="leads out"):
        open_source(source_config(kind="stills", path=str(file), split="all"))
    write_lines(file, [{"image": "0.png", "caption": "x"}])
    with pytest.raises(ConfigurationError, match="1 pictures, at least 2"):
        open_source(source_config(kind="stills", path=str(file), split="all"))
