"""Trains every family of policies that accuracy.py compares, with several seeds each.

    python -m benchmarks.world.train_policies --output runs/policies
    python benchmarks/accuracy.py --benchmark world --policies runs/policies
    python -m benchmarks.world.train_policies --world footage --output runs/footage-policies

A family is one training with one thing changed: that of the demo, or that for frozen tokens of real
footage. What is there already is left alone, so a stopped call goes on.
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
CONFIGS = {
    world: ROOT / "train" / "configs" / file for world, file in (("drawn", "demo.toml"), ("footage", "footage.toml"))
}
# What --set changes against the world's configuration; "score" is the demo's recipe, "paper" the paper's objective.
PAPER = ["rollout.objective=paper"]
FAMILIES: dict[str, list[str]] = {
    "score": [],
    "no-residual": ["policy.use_residual=false"],
    "paper": [*PAPER, "policy.ranked_share=1"],
    "paper-no-residual": [*PAPER, "policy.ranked_share=1", "policy.use_residual=false"],
    # As many steps as the others' two stages together.
    "paper-pseudo-only": [*PAPER, "policy.ranked_share=1", "stage.warmup.steps=1150"],
    "budget-matched": ["policy.ranked_share=1", "rollout.ratio_min=0.06", "rollout.ratio_max=0.5"],
}
FOOTAGE_FAMILIES: dict[str, list[str]] = {
    "budget-matched": [],
    "no-residual": ["policy.use_residual=false"],
    "coverage": ["policy.ranked_share=0.04"],
    "score": ["policy.ranked_share=0.03", "rollout.ratio_max=0.15"],
    "paper": PAPER,
}
WORLDS = {"drawn": FAMILIES, "footage": FOOTAGE_FAMILIES}


def command(world: str, family: str, seed: int, output: Path, extra: list[str]) -> list[str]:
    """The call that trains one policy; see ``python -m score_vllm.train --help``."""
    call = [sys.executable, "-m", "score_vllm.train", "--config", str(CONFIGS[world])]
    if family == "paper-pseudo-only":
        call += ["--stage", "warmup"]
    # All families meet the same clips: encoded once, shared on disk.
    shared = ["cache.kind=disk", f"cache.directory={output.parent / 'features'}", "cache.max_gib=4"]
    sets = [f"output={output}", f"seed={seed}", *WORLDS[world][family], *shared, *extra]
    return [*call, *(part for one in sets for part in ("--set", one))]


def train(world: str, family: str, seed: int, folder: Path, extra: list[str], threads: int) -> str | None:
    """Train one policy; returns what went wrong, or None."""
    output = folder / f"{family}-{seed}"
    if (output / "policy" / "config.json").is_file():
        return None
    output.mkdir(parents=True, exist_ok=True)
    log = output / "output.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as sink:
        done = subprocess.run(
            command(world, family, seed, output, extra), stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        return f"{family}-{seed} ended with {done.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
    return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--world", choices=WORLDS, default="drawn")
    parser.add_argument("--families", help="with commas between; all of the world's by default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="policies trained at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="passed on to every training")
    args = parser.parse_args()
    known = WORLDS[args.world]
    families = args.families.split(",") if args.families else [*known]
    if unknown := [name for name in families if name not in known]:
        parser.error(f"--families must be of {', '.join(known)}, got {', '.join(unknown)}")
    work = [(family, int(seed)) for seed in args.seeds.split(",") for family in families]
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(train, args.world, *one, args.output, args.extra, args.threads) for one in work]
        failures = [f.result() for f in tqdm(waiting, desc="policies", unit="policy")]
    if found := [failure for failure in failures if failure]:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
