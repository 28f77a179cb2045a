"""The training loop: it learns, it resumes to the bit, it does not depend on how samples are spread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from score_vllm import RetentionPolicy
from score_vllm.train.__main__ import main, make_accelerator
from score_vllm.train.checkpoint import checkpoints, load_checkpoint
from score_vllm.train.config import TrainSettings, load_settings
from score_vllm.train.frozen.model import EncodedSample
from score_vllm.train.stopping import TrainingStoppedError
from score_vllm.train.trainer import Trainer

from .train_toy import ToyEngine, ToySource, tokens_of, toy_sources, write_config

TOY = Path(__file__).parent / "train_toy.py"
ROOT = Path(__file__).resolve().parents[2]


def settings_of(folder: Path, *overrides: str, name: str = "run") -> TrainSettings:
    return load_settings(write_config(folder, name), overrides)


def train(settings: TrainSettings, engine: Any = None, source: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(settings, engine or ToyEngine(), make_accelerator(settings), toy_sources(source))
    assert trainer.run(**options) == 0
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "policy.safetensors")


def same(a: Path, b: Path) -> None:
    found, wanted = weights(a), weights(b)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    (new, *_), (old, *_) = checkpoints(a / "checkpoints"), checkpoints(b / "checkpoints")
    assert new.name == old.name
    found, wanted = load_checkpoint(new)[1], load_checkpoint(old)[1]
    assert wanted
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def toy(config: Path, *arguments: str, launcher: Sequence[str] = (sys.executable,), **environment: str) -> Any:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.Popen([*launcher, str(TOY), str(config), *arguments], env=env)


def auc(policy: RetentionPolicy) -> float:
    """Chance that an important token of a video never trained on is scored above another one."""
    scores, labels = [], []
    with torch.no_grad():
        for key in range(1000, 1010):
            x, important = tokens_of(str(key))
            scores.append(policy(x).flatten())
            labels.append(important)
    score, label = torch.cat(scores), torch.cat(labels)
    return float((score[label][:, None] > score[~label][None]).float().mean())


@pytest.mark.parametrize("objective", ["paper", "budget-matched"])
@pytest.mark.parametrize("optimizer", ["optimizer.name=adamw", "optimizer.name=sgd"])
def test_the_policy_learns_which_tokens_matter(tmp_path: Path, objective: str, optimizer: str) -> None:
    # The losses are means over tokens or picks, so that their gradients have different sizes, which Adam levels.
    rate = {"adamw": "0.01", "sgd": "3" if objective == "paper" else "0.3"}[optimizer.split("=")[1]]
    settings = settings_of(
        tmp_path,
        f"rollout.objective={objective}",
        "stage.main.steps=200",
        "checkpoint.every=0",
        "collapse_patience=0",  # the toy is solved long before the end: its masks no longer vary, and should not
        optimizer,
        f"optimizer.lr={rate}",
    )
    fresh = auc(RetentionPolicy(8, seed=settings.seed))
    assert fresh < 0.9, "the start must not know the answer"
    train(settings, only="main", source=ToySource(200))
    trained = RetentionPolicy.from_pretrained(tmp_path / "run" / "policy")
    assert auc(trained) > 0.95
    if objective == "budget-matched":
        return  # its ratios reach below what the important tokens need: the gap has a floor
    steps = [line for line in log_of(tmp_path / "run") if line["event"] == "step"]
    assert sum(s["ce_gap"] for s in steps[-20:]) < 0.5 * sum(s["ce_gap"] for s in steps[:20])


def test_artefacts_and_log(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    train(settings)
    run = tmp_path / "run"
    lines = log_of(run)
    assert [line["event"] for line in lines] == ["started", *["step"] * 12, "finished"]
    assert [line["stage"] for line in lines[1:-1]] == ["warmup"] * 6 + ["main"] * 6
    for name in ("reward", "ce_gap", "sparsity", "safe_share", "entropy", "tokens_per_second", "loss"):
        assert all(isinstance(line[name], float) for line in lines[1:-1]), name
    assert 0.3 < lines[1]["sparsity"] < 0.7
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-12", "step-8"], "two are kept"
    policy = RetentionPolicy.from_pretrained(run / "policy")
    for made in (policy.config.provenance, load_checkpoint(run / "checkpoints" / "step-12")[2].provenance):
        assert made["config_digest"] == settings.digest()
        assert made["steps"] == 12
        assert made["seed"] == 5
        assert "torch" in made["versions"]
        assert "commit" in made


def test_features_and_base_ce_are_computed_once(tmp_path: Path) -> None:
    engine, source = ToyEngine(), ToySource(5)
    train(settings_of(tmp_path, "stage.main.steps=20"), engine, source, only="main")
    assert sorted(engine.encoded) == list("01234")
    assert engine.base_calls == 5
    assert sorted(source.read) == [0, 1, 2, 3, 4]


def test_features_on_disk_serve_the_next_run(tmp_path: Path) -> None:
    cache = ("cache.kind=disk", f"cache.directory={tmp_path / 'features'}")
    train(settings_of(tmp_path, *cache))
    engine = ToyEngine()
    train(settings_of(tmp_path, *cache, name="second"), engine)
    assert engine.encoded == []
    same(tmp_path / "second", tmp_path / "run")


def test_broken_samples_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(settings_of(tmp_path), source=ToySource(5, broken=(1, 3)))
    assert log_of(tmp_path / "run")[-2]["broken_samples"] == 2
    assert "1: unreadable on purpose" in caplog.text
    with pytest.raises(TrainingStoppedError, match=r"3 samples in a row are broken.*unreadable on purpose"):
        train(settings_of(tmp_path, name="b"), source=ToySource(3, broken=(0, 1, 2)))


def test_frame_bounds_of_a_stage(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"8 frames, stage.warmup takes 1 to 6"):
        train(settings_of(tmp_path, "stage.warmup.max_frames=6"))


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    for optimizer in ("adamw", "sgd"):
        extra = [f"optimizer.name={optimizer}", "optimizer.warmup_steps=3", "checkpoint.every=1"]
        whole, cut = f"whole-{optimizer}", f"cut-{optimizer}"
        train(settings_of(tmp_path, *extra, name=whole))
        train(settings_of(tmp_path, *extra, "stage.main.steps=2", name=cut))
        trainer = train(settings_of(tmp_path, *extra, name=cut), resume=True)
        assert trainer.step == 12
        same(tmp_path / cut, tmp_path / whole)
        steps = [line["step"] for line in log_of(tmp_path / cut) if line["event"] == "step"]
        assert steps == [*range(1, 13)]


def test_stages_run_one_by_one_equal_one_run(tmp_path: Path) -> None:
    train(settings_of(tmp_path))
    train(settings_of(tmp_path, name="parts"), only="warmup")
    train(settings_of(tmp_path, name="parts"), only="main", resume=True)
    same(tmp_path / "parts", tmp_path / "run")


def test_a_stage_starts_from_a_given_policy(tmp_path: Path) -> None:
    train(settings_of(tmp_path), only="warmup")
    init = f"policy.init={tmp_path / 'run' / 'policy'}"
    trainer = Trainer(
        settings := settings_of(tmp_path, init, name="b"), ToyEngine(), make_accelerator(settings), toy_sources()
    )
    assert all(torch.equal(p, weights(tmp_path / "run")[n]) for n, p in trainer.policy.named_parameters())


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path: Path) -> None:
    train(settings_of(tmp_path))
    with pytest.raises(ValueError, match="--resume"):
        train(settings_of(tmp_path))
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        train(settings_of(tmp_path, "optimizer.lr=0.02"), resume=True)
    with pytest.raises(ValueError, match="samples per step"):
        train(settings_of(tmp_path, "optimizer.samples_per_step=2"), resume=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(settings_of(tmp_path))
    train(settings_of(tmp_path, name="b"))
    newest = tmp_path / "b" / "checkpoints" / "step-12" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4] + b"\0\0\0\1")
    trainer = train(settings_of(tmp_path, name="b"), resume=True)
    assert "not what was written" in caplog.text
    assert trainer.step == 12
    same(tmp_path / "b", tmp_path / "run")


def test_kill_in_the_middle_of_a_save_loses_only_the_steps_since(tmp_path: Path) -> None:
    train(settings_of(tmp_path))
    config = write_config(tmp_path, "killed")
    assert toy(config, TOY_KILL_AT_SAVE="8").wait(120) == -signal.SIGKILL
    folder = tmp_path / "killed" / "checkpoints"
    assert [p.name for p in checkpoints(folder)] == ["step-6", "step-4"]
    assert list(folder.glob(".step-8-*")), "the kill must have come in the middle of the save"
    train(load_settings(config), resume=True)
    assert not list(folder.glob(".step-*"))
    same(tmp_path / "killed", tmp_path / "run")


def test_sigterm_saves_and_exits(tmp_path: Path) -> None:
    train(settings_of(tmp_path))
    config = write_config(tmp_path, "stopped")
    process = toy(config, TOY_SLEEP="0.2", launcher=(sys.executable,))
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or log.read_text().count('"step"') < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    last = log_of(tmp_path / "stopped")[-1]
    assert last["event"] == "stopped by a signal"
    assert checkpoints(tmp_path / "stopped" / "checkpoints")[0].name == f"step-{last['step']}"
    assert 0 < last["step"] < 12
    train(load_settings(config), resume=True)
    same(tmp_path / "stopped", tmp_path / "run")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    train(settings_of(tmp_path, "optimizer.samples_per_step=2"))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    config = write_config(tmp_path, "two")
    assert toy(config, launcher=launcher).wait(300) == 0
    started, *_, last = log_of(tmp_path / "two")
    assert started["processes"] == 2, "two processes must really have run"
    assert last["event"] == "finished"
    same(tmp_path / "two", tmp_path / "run")
    for name in ("reward", "tokens"):
        alone = [line[name] for line in log_of(tmp_path / "run") if line["event"] == "step"]
        assert [line[name] for line in log_of(tmp_path / "two") if line["event"] == "step"] == pytest.approx(alone)


class BadEngine(ToyEngine):
    """Not a number from the third call with rollouts on."""

    calls = 0

    def cross_entropy(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        self.calls += len(kept) > 1
        ce = super().cross_entropy(encoded, kept)
        return ce * float("nan") if self.calls > 2 else ce


class UselessVideo(ToyEngine):
    """No token matters, so that dropping everything is best; or, with the sign turned, every token does."""

    slope = 0.0

    def cross_entropy(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([1 + self.slope * (1 - k.shape[0] / 64) for k in kept])


class DearVideo(UselessVideo):
    slope = 50.0


def test_nan_stops_with_the_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"step 3, stage 'warmup': \d+: the frozen model's cross-entropy"):
        train(settings_of(tmp_path, "checkpoint.every=1"), BadEngine())
    assert log_of(tmp_path / "run")[-1]["event"] == "failed"
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-2"


@pytest.mark.parametrize(
    ("engine", "word"),
    [
        (UselessVideo, r"keeps no token|no longer varies its masks \(kept share 0\.0"),
        (DearVideo, r"keeps every token|no longer varies its masks \(kept share 0\.99"),
    ],
)
def test_a_collapsed_policy_stops_with_the_diagnosis(tmp_path: Path, engine: type, word: str) -> None:
    overrides = ["optimizer.lr=0.1", "stage.steps=400", "collapse_patience=5", "checkpoint.every=0"]
    with pytest.raises(TrainingStoppedError, match=word):
        train(settings_of(tmp_path, *overrides), engine())


def test_the_collapse_does_not_cost_the_last_good_state(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "optimizer.lr=0.1", "stage.steps=400", "collapse_patience=5", "checkpoint.every=5")
    with pytest.raises(TrainingStoppedError):
        train(settings, DearVideo())
    assert checkpoints(tmp_path / "run" / "checkpoints")


CLI = """
output = "{output}"
[model]
path = "{model}"
device = "cpu"
[rollout]
group_size = 4
[tracking]
progress = false
[report]
clips = 2
pictures = 1
questions = 1
[stage.warmup]
steps = 2
tau = 1.01
max_frames = 64
[[stage.warmup.sources]]
kind = "world-pseudo"
limit = 4
[stage.main]
steps = 1
[[stage.main.sources]]
kind = "world"
limit = 4
"""


def test_command_line_trains_a_policy_for_a_real_model(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(CLI.format(output=tmp_path / "run", model=tiny_model))
    assert main(["--config", str(config), "--check"]) == 0
    plan = capsys.readouterr().out
    assert "warmup: 2 steps, tau 1.01" in plan
    assert "world-pseudo: 4 samples" in plan
    assert plan.count("target tokens of 4 samples: median") == 2
    assert plan.count("asked 'Describe the video.', answer") == 8
    assert not (tmp_path / "run").exists()
    assert main(["--config", str(config)]) == 0
    policy = RetentionPolicy.from_pretrained(tmp_path / "run" / "policy")
    fresh = RetentionPolicy(policy.config.hidden_size)
    assert not torch.equal(policy.w_in, fresh.w_in)
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))
    page = tmp_path / "run" / "report.html"
    assert "measured 2 clips, cross-entropy with all tokens" in capsys.readouterr().out
    said = page.read_text()
    assert "2 questions" in said
    assert "world:report:" in said
    assert policy.digest() in said

    def fail(*_: Any) -> None:
        raise RuntimeError("no room on the disk")

    page.unlink()
    monkeypatch.setattr("score_vllm.train.__main__.write_report", fail)
    assert main(["--config", str(config), "--set", "stage.main.steps=2", "--resume"]) == 0
    monkeypatch.undo()
    assert RetentionPolicy.from_pretrained(tmp_path / "run" / "policy").config.provenance["steps"] == 4, "is not lost"
    assert not page.exists()
    assert log_of(tmp_path / "run")[-1]["step"] == 4
    assert main(["--config", str(config)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_training_that_stops_itself_is_reported(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(CLI.format(output=tmp_path / "run", model=tiny_model))

    def collapse(*_: Any, **__: Any) -> None:
        raise TrainingStoppedError("the policy has collapsed: on purpose")

    monkeypatch.setattr("score_vllm.train.trainer.CollapseWatch.check", collapse)
    assert main(["--config", str(config), "--set", "tracking.tracker=none"]) == 1
    said = (tmp_path / "run" / "report.html").read_text()
    assert "the policy has collapsed: on purpose" in said
    assert "Learning rate" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "optimizer.lr=-1"], ["optimizer.lr", "(0, 10]", "-1"]),
        (["--set", "optimiser.lr=1"], ["optimiser", "did you mean 'optimizer'"]),
        (["--set", "stage.finale.steps=1"], ["finale", "warmup"]),
        (["--stage", "finale"], ["finale", "warmup"]),
        (["--set", "model.path=nowhere/at/all"], ["model.path", "nowhere/at/all"]),
        (["--set", "policy.init=nowhere/at/all"], ["nowhere/at/all"]),
        (["--set", "model.shard=fsdp"], ["model.shard", "torchrun"]),
        (["--set", 'stage.main.sources=[{kind="jsonl", path="no.jsonl"}]'], ["stage.main", "no.jsonl"]),
        (["--set", "tracking.tracker=wandb"], ["wandb", "pip install"]),
        (["--set", "output=/proc/run"], ["output '/proc/run' cannot be written in '/proc'"]),
        (["--set", "output=/dev/null/run"], ["output '/dev/null/run' cannot be written in '/dev/null'"]),
    ],
)
def test_command_line_errors_say_what_is_wrong(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    if "wandb" in arguments[1]:
        monkeypatch.setitem(sys.modules, "wandb", None)
        import importlib.util

        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else real(n, *a))
    config = tmp_path / "c.toml"
    config.write_text(CLI.format(output=tmp_path / "run", model=tiny_model))
    check = [] if "fsdp" in arguments[1] else ["--check"]
    assert main(["--config", str(config), *check, *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_real_model_over_two_processes(tmp_path: Path, tiny_model: Path, shard: str) -> None:
    """Sharded or whole, two processes give the losses of one; their caches and micro-batches differ in number."""
    config = tmp_path / "c.toml"
    config.write_text(CLI.format(output=tmp_path / "one", model=tiny_model))
    common = ["--set", "tracking.tracker=none", "--set", "stage.steps=3", "--set", "rollout.max_rollout_tokens=1500"]
    assert main(["--config", str(config), *common, "--set", "optimizer.samples_per_step=2"]) == 0
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = [
        "--config",
        str(config),
        *common,
        "--set",
        f"output={tmp_path / 'two'}",
        "--set",
        f"model.shard={shard}",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, "-m", "score_vllm.train", *arguments], env=env, timeout=400, check=False)
    assert done.returncode == 0
    assert log_of(tmp_path / "two")[0]["processes"] == 2
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)
    assert "Beside the baselines" in (tmp_path / "two" / "report.html").read_text()
    losses = [[s["ce"] for s in log_of(tmp_path / n) if s["event"] == "step"] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_errors_of_training_keep_their_traceback(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the user's mistakes are one line with exit status 2; anything else is shown whole."""
    config = tmp_path / "c.toml"
    config.write_text(CLI.format(output=tmp_path / "run", model=tiny_model))
    for error in (RuntimeError("CUDA out of memory"), ValueError("shapes differ"), FileNotFoundError("gone")):

        def broken(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr("score_vllm.train.trainer.sample_step", broken)
        with pytest.raises(type(error), match=str(error)):
            main(["--config", str(config), "--set", "tracking.tracker=none"])


def test_a_crash_ends_the_process_with_one_and_a_traceback(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = subprocess.run(
        [sys.executable, str(TOY), str(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "TOY_CRASH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: a shape is wrong, on purpose")


SHORT = """
output = "{output}"
[model]
path = "{model}"
device = "cpu"
[tracking]
tracker = "none"
progress = false
[stage.main]
steps = 1
[[stage.main.sources]]
kind = "llava-video"
path = "{data}"
task = "mc"
split = "all"
"""


def test_letters_are_no_targets_unless_told(
    tmp_path: Path, tiny_model: Path, clips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "0_30_s_academic_v0_1"
    folder.mkdir()
    talk = [{"from": "human", "value": "<image>\nWhich?\nA. This.\nB. That."}, {"from": "gpt", "value": "A."}]
    (folder / "clip.mp4").write_bytes(clips["plain"].read_bytes())
    rows = [{"id": str(i), "video": "clip.mp4", "conversations": talk} for i in range(20)]
    (folder / "0_30_s_academic_mc_v0_1_qa_processed.json").write_text(json.dumps(rows))
    config = tmp_path / "c.toml"
    config.write_text(SHORT.format(output=tmp_path / "run", model=tiny_model, data=folder))
    for check in ([], ["--check"]):
        assert main(["--config", str(config), *check]) == 2
        said = capsys.readouterr()
        assert "stage.main: the median target has 2 tokens, fewer than 8" in said.err
        assert "stage.main.allow_short_targets=true" in said.err
    assert "target tokens of 20 samples: median 2" in said.out
    assert f"2-3 {'#' * 40} 20" in said.out
    assert said.out.count("answer 'A.'") == 5
    assert main(["--config", str(config), "--check", "--set", "stage.main.allow_short_targets=true"]) == 0
