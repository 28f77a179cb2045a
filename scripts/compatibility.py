"""The table of versions that the tests have run on.

Every run of pytest over whole tiers leaves what it ran in pytest's cache (tests/conftest.py); nothing here is typed in.

python scripts/compatibility.py record    # take the last run into score_vllm/assets/tested_versions.json
python scripts/compatibility.py           # write the table in docs/operations.md
python scripts/compatibility.py --check   # change nothing; exit 1 where the table is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

from score_vllm.compatibility import TIERS, TestedRun, minor, tested_runs

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "score_vllm" / "assets" / "tested_versions.json"
# Where tests/conftest.py leaves the last run.
LAST_RUN = ROOT / ".pytest_cache" / "d" / "score" / "last_run.json"
PAGE = ROOT / "docs" / "operations.md"
MARKED = re.compile(r"(?<=<!-- versions -->\n)(.*?)(?=<!-- /versions -->)", re.DOTALL)


def table() -> str:
    """Markdown: a row per recorded run, and one per supported Python that no complete run had."""
    lines = ["| vLLM | transformers | Python | torch | platform | tests passed | failed | date |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    runs = tested_runs()
    for run in runs:
        passed = ", ".join(f"{tier} {run.passed.get(tier, 0):,}" for tier in TIERS)
        cells = [run.vllm, run.transformers, run.python, run.torch, run.platform, passed]
        cells += [str(sum(run.failed.values())), run.date]
        lines.append("| " + " | ".join(cells) + " |")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)]
    done = {(run.key[2], run.platform) for run in runs if run.complete}
    for platform in ("cpu", "cuda"):
        (wanted,) = (line.split("==")[1].rstrip(".*") for line in project["optional-dependencies"][platform])
        if missing := [python for python in supported if (python, platform) not in done]:
            lines.append(f"| {wanted} | any | {', '.join(missing)} | any | {platform} | not tested | | |")
    return "\n".join(lines) + "\n"


def record() -> None:
    """Put the last run in the place of an earlier one of the same versions.

    Raises:
        SystemExit: there is none, or it left out a tier or failed.
    """
    if not LAST_RUN.is_file():
        sys.exit(f"{LAST_RUN} is missing: run the tests first (make test)")
    run = TestedRun(**json.loads(LAST_RUN.read_text()))
    if not run.complete:
        sys.exit(f"the last run was not complete: passed {run.passed}, failed {run.failed}; all of {TIERS} must run")
    kept = [run, *(old for old in tested_runs() if old.key != run.key)]
    RECORD.write_text(json.dumps([asdict(one) for one in kept], indent=2) + "\n")
    print(f"recorded: vLLM {minor(run.vllm)}, transformers {minor(run.transformers)}, Python {minor(run.python)}")


def main(argv: list[str] | None = None) -> int:
    """0 where the table agrees or has been written, 1 where ``--check`` found that it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["record"], help="take in the last run, then write the table")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the table is out of date")
    args = parser.parse_args(argv)
    if args.command == "record":
        record()
    old = PAGE.read_text(encoding="utf-8")
    new = MARKED.sub(lambda _: table(), old)
    if args.check or new == old:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
