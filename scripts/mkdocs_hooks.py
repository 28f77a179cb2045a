"""Hooks of mkdocs.yml: pages may link files of the repository (``../benchmarks/results/x.json``).

On the built site such a file is served from ``repository/``; a link to a file that does not exist ends a strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to."""
    linked = {name for page in files.documentation_pages() for name in OUTSIDE.findall(page.content_string)}
    for name in sorted(linked):
        if (ROOT / name).is_file():
            uri = posixpath.join("repository", name)
            # Markdown of another folder is shown as it is: its own links are not of this site.
            uri += ".txt" if name.endswith(".md") else ""
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links out of docs/ at the copies."""
    return OUTSIDE.sub(lambda m: f"](repository/{m[1]}" + (".txt" if m[1].endswith(".md") else ""), markdown)
