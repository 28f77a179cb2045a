"""Examples that need a cluster, against programs that only say how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_slurm_script_starts_the_recipe_on_every_node(tmp_path: Path) -> None:
    script = tmp_path / "train.slurm"
    shutil.copy(ROOT / "examples" / "train.slurm", script)
    for name, line in {
        "bin/scontrol": "printf 'node7\\nnode8\\n'",
        "bin/srun": 'echo srun "$@"',
        ".venv/bin/python": 'echo python "$@"',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "11", "SLURM_GPUS_ON_NODE": "4"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script), "my.toml"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check, train = done.stdout.splitlines()
    assert check == "python -m score_vllm.train --config my.toml --check"
    assert train == (
        "srun .venv/bin/torchrun --nnodes 2 --nproc_per_node 4 --rdzv_id 11 --rdzv_backend c10d "
        "--rdzv_endpoint node7:29500 -m score_vllm.train --config my.toml --resume"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "-o", "out"], "folder 'nowhere' is no folder"),
        ([".", "-o", "out", "--retention", "2"], "retention_ratio must be"),
        ([".", "-o", "out", "--model", "nope"], "--model 'nope' is no directory"),
    ],
)
def test_captions_of_a_folder_are_refused_in_a_sentence(argv: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/caption_folder.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_offline_example_reads_its_arguments_before_an_engine_starts(tmp_path: Path) -> None:
    for video, ratio, message in (
        ("nothere.mp4", "0.1", "nothere.mp4"),
        ("clip.mp4", "2", "must be a number in (0, 1]"),
    ):
        path = ROOT / "score_vllm/assets/demo" / video
        command = [sys.executable, str(ROOT / "examples/offline_inference.py"), str(path), "--retention", ratio]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
