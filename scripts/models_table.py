"""Write the README's table of supported models from score_vllm/architectures.py, between its two markers.

python scripts/models_table.py            # rewrite it where it is out of date
python scripts/models_table.py --check    # change nothing; exit 1 where it is
"""

from __future__ import annotations

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

from score_vllm.architectures import SUPPORTED
from score_vllm.server.options import TRAINING_FREE_METHOD

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(?<=<!-- models -->\n)(.*?)(?=<!-- /models -->)", re.DOTALL)
SIZED = re.compile(r"(.*?-)(\d[\d.]*B(?:-A\d+B)?)(.*)", re.IGNORECASE)


def grouped(hub_ids: list[str]) -> str:
    """``a-3B, a-7B`` as ``a-{3B,7B}``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for hub_id in hub_ids:
        match = SIZED.fullmatch(hub_id)
        head, size, tail = match.groups() if match else (hub_id, "", "")
        groups.setdefault((head, tail), []).append(size)
    named = [
        f"`{head}{'{' + ','.join(sizes) + '}' if len(sizes) > 1 else sizes[0]}{tail}`"
        for (head, tail), sizes in groups.items()
    ]
    return ", ".join(named)


def table() -> str:
    """Markdown: a row per family, which is a file of score_vllm/models."""
    lines = ["| architecture | hub ids | policy | checked with | |", "|---|---|---|---|---|"]
    for _, entries in groupby(SUPPORTED, lambda entry: entry.target.partition(":")[0]):
        family = list(entries)
        ids = grouped([hub_id for entry in family for hub_id in entry.models.values()])
        one = {
            (entry.policy or f"none yet: `{TRAINING_FREE_METHOD}` selects", entry.checked, entry.notes)
            for entry in family
        }
        (policy, checked, notes), *others = one
        assert not others, f"architectures of one file differ in policy, checked or notes: {sorted(one)}"
        cells = [", ".join(f"`{entry.name}`" for entry in family), ids, policy, checked, notes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """0 where the table agrees or has been written, 1 where ``--check`` found that it does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the table is out of date")
    args = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    new = MARKED.sub(lambda _: table(), old)
    if args.check or new == old:
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    print(f"written: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
