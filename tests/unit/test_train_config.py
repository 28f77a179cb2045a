"""The configuration: what it refuses and how it says so; overrides; what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from score_vllm.train.config import differences, load_settings, settings_from

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
WORLD = {"kind": "world"}


def raw() -> dict[str, Any]:
    return {"output": "run", "stage": {"a": {"sources": [dict(WORLD)]}, "b": {"tau": 1.5, "sources": [dict(WORLD)]}}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    if path.name == "own_clips.toml":
        with pytest.raises(ValueError, match="clips must name the folder"):
            load_settings(path)
    settings = load_settings(path, ["clips=somewhere"] if path.name == "own_clips.toml" else [])
    assert settings.rollout.group_size == 16
    if path.name == "footage.toml":  # not the paper's curriculum
        assert [(s.name, s.tau) for s in settings.stages] == [("main", 1.02)]
        return
    assert [(s.name, s.tau) for s in settings.stages] == [("warmup", 1.01), ("main", 1.02)]
    warmup, main = settings.stages
    assert (warmup.min_frames, warmup.max_frames) == (6, 24)
    assert main.max_frames == (64 if path.name in ("own_clips.toml", "llava_video_7b.toml") else 128)


def test_the_papers_numbers() -> None:
    settings = load_settings(CONFIGS / "qwen2_5_vl_7b.toml")
    warmup, main = settings.stages
    assert (settings.optimizer.name, settings.optimizer.lr) == ("adamw", 3e-4), "not the paper's: see test_train_recipe"
    assert warmup.sources[0].limit == 10_000
    assert sum(source.limit for source in main.sources) == 57_000


@pytest.mark.parametrize(("name", "frames"), [("qwen3_vl_8b", 128), ("llava_video_7b", 64)])
def test_other_families_follow_the_same_recipe(name: str, frames: int) -> None:
    settings, paper = load_settings(CONFIGS / f"{name}.toml"), load_settings(CONFIGS / "qwen2_5_vl_7b.toml")
    assert (settings.optimizer, settings.rollout, settings.policy) == (paper.optimizer, paper.rollout, paper.policy)
    assert [stage.steps for stage in settings.stages] == [stage.steps for stage in paper.stages]
    assert settings.stages[1].max_frames == frames
    assert settings.output == f"runs/{name}"


def test_overrides() -> None:
    changes = ["stage.steps=7", "stage.b.steps=9", "optimizer.lr=1", "output=/x y/z", "stage.a.sources.0.limit=3"]
    settings = settings_from(raw(), changes)
    assert [s.steps for s in settings.stages] == [7, 9]
    assert settings.optimizer.lr == 1.0
    assert isinstance(settings.optimizer.lr, float)
    assert settings.output == "/x y/z"
    assert [s.sources[0].limit for s in settings.stages] == [3, 0]
    assert settings_from(raw()).named("b").tau == 1.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=0", ["optimizer.lr", "(0, 10]", "got 0"]),
        ("optimizer.lr=fast", ["optimizer.lr", "a number", "'fast'"]),
        ("optimizer.lr=nan", ["optimizer.lr", "(0, 10]"]),
        ("optimizer.lr=true", ["optimizer.lr", "a number"]),
        ("optimizer.name=adam", ["optimizer.name", "'adamw', 'sgd'", "did you mean 'adamw'"]),
        ("rollout.group_size=1", ["rollout.group_size", "[2, 4096]", "got 1"]),
        ("rollout.group_size=2.5", ["rollout.group_size", "an integer"]),
        ("rollout.ratio_min=0.9", ["rollout.ratio_min", "ratio_max = 0.5"]),
        ("rollout.objetive=paper", ["rollout.objetive", "did you mean 'objective'"]),
        ("stage.c.steps=1", ["'a', 'b'"]),
        ("stage.tau=0.5", ["stage.a.tau", "[1, 10]"]),
        ("stage.a.min_frames=500", ["stage.a.min_frames", "max_frames = 128"]),
        ("stage.a.name=x", ["stage.a.name"]),
        ("stage.a.sources=[]", ["stage.a.sources", "non-empty"]),
        ("stage.a.sources.0.kind=wrld", ["stage.a.sources.0", "did you mean 'world'"]),
        ("stage.a.sources.4.limit=1", ["index in [0, 0]"]),
        ("policy.use_residual=1", ["policy.use_residual", "true or false"]),
        ("output=", ["output"]),
        ("stages=1", ["'stages'", "did you mean 'stage'"]),
        ("seed.x=1", ["'seed'", "table"]),
        ("nothing", ["KEY=VALUE"]),
    ],
)
def test_wrong_overrides_are_refused(override: str, words: list[str]) -> None:
    base = {"seed": 1, **raw()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        settings_from(base, [override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_no_stage_and_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        settings_from({"output": "x"})
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml"):
        load_settings(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML.*line 1"):
        load_settings(tmp_path / "bad.toml")


def test_what_a_resumed_run_may_change() -> None:
    def changed(override: str) -> list[str]:
        old, new = settings_from(raw()), settings_from(raw(), [override])
        names = differences(old.to_dict(), new.to_dict())
        assert (old.digest() != new.digest()) == bool(names)
        return names

    free = ["output=elsewhere", "stage.steps=5", "tracking.tracker=none", "cache.kind=none", "checkpoint.every=3"]
    assert [name for override in free for name in changed(override)] == []
    assert changed("optimizer.lr=0.5") == ["optimizer.lr"]
    assert changed("seed=3") == ["seed"]
    assert changed("stage.b.tau=1.1") == ["stage.b.tau"]
    assert changed("stage.a.sources.0.limit=9") == ["stage.a.sources"]
