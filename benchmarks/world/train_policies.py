"""Trains every family of policies that accuracy.py compares, with several seeds each.

    python -m benchmarks.world.train_policies --output runs/policies
    python benchmarks/accuracy.py --benchmark world --policies runs/policies

A family is the demo's training with one thing changed. What is there already is left alone, so a stopped call goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "train" / "configs" / "demo.toml"
# Names of stages, and what --set changes against demo.toml; "score" is the paper's method as it is served.
EXACT = ["rollout.objective=budget-matched"]
FAMILIES: dict[str, list[str]] = {
    "score": [],
    "no-residual": ["policy.use_residual=false"],
    # As many steps as the others' two stages together.
    "pseudo-only": ["stage.warmup.steps=1150"],
    "budget-matched": EXACT,
    "leave-one-out": [*EXACT, "rollout.advantage=leave-one-out"],
    "high-ratios": [*EXACT, "rollout.high_share=0.5"],
    "ratio-input": [*EXACT, "policy.ratio_input=true"],
    "coverage": [*EXACT, "policy.ranked_share=0.04"],
    "dense-start": [*EXACT, "stage.warmup.dense_steps=60"],
}


def command(family: str, seed: int, output: Path, extra: list[str]) -> list[str]:
    """The call that trains one policy; see ``python -m score_vllm.train --help``."""
    call = [sys.executable, "-m", "score_vllm.train", "--config", str(CONFIG)]
    if family == "pseudo-only":
        call += ["--stage", "warmup"]
    # All families meet the same clips: encoded once, shared on disk.
    shared = ["cache.kind=disk", f"cache.directory={output.parent / 'features'}", "cache.max_gib=4"]
    sets = [f"output={output}", f"seed={seed}", *FAMILIES[family], *shared, *extra]
    return [*call, *(part for one in sets for part in ("--set", one))]


def train(family: str, seed: int, folder: Path, extra: list[str], threads: int) -> str | None:
    """Train one policy; returns what went wrong, or None."""
    output = folder / f"{family}-{seed}"
    if (output / "policy" / "config.json").is_file():
        return None
    output.mkdir(parents=True, exist_ok=True)
    log = output / "output.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as sink:
        done = subprocess.run(
            command(family, seed, output, extra), stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        return f"{family}-{seed} ended with {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
    return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="policies trained at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="passed on to every training")
    args = parser.parse_args()
    families = args.families.split(",")
    if unknown := [name for name in families if name not in FAMILIES]:
        parser.error(f"--families must be of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    work = [(family, int(seed)) for seed in args.seeds.split(",") for family in families]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(train, *one, args.output, args.extra, args.threads) for one in work]
        failures = [f.result() for f in tqdm(waiting, desc="policies", unit="policy")]
    if found := [failure for failure in failures if failure]:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
