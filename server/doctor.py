"""``score-serve doctor``: would this command line serve compressed videos here, and if not, what helps?

This process imports no vLLM. What only vLLM can say comes from a process that is started as vLLM starts its workers
(:mod:`score_vllm.server.doctor_probe`), so that an import that crashes or hangs is a finding like any other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from typing import Any

from score_vllm import plugin
from score_vllm.compatibility import untested
from score_vllm.demo import demo_clip
from score_vllm.server import options

PROG = "score-serve doctor"
USAGE = f"{PROG} [--json] [--timeout SECONDS] [--model MODEL] [all other options that score-serve would get]"
DESCRIPTION = "Checks this machine, and with --model the model, its policy and its memory, before a server is started."
STATES = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: of the check.
        state: one of :data:`STATES`.
        detail: what was found.
        remedy: what to do about a warning or an error.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.state in STATES
        assert (self.state == "ok") == (not self.remedy), "what is not ok has a remedy"

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.name}: {self.detail}"
        return f"{line}\n         -> {self.remedy}" if self.remedy else line


def check_versions() -> Iterator[Finding]:
    """Against the record of test runs."""
    try:
        vllm = plugin.installed_version()
        plugin.check_version()
    except plugin.UntestedVersionError as error:
        sentence, _, remedy = str(error).partition("; ")
        yield Finding("versions", "error", sentence, remedy)
        return
    transformers, python = metadata.version("transformers"), platform.python_version()
    text = f"vLLM {vllm}, transformers {transformers}, torch {metadata.version('torch')}, Python {python}"
    if (reason := untested(vllm, transformers, python)) is None:
        yield Finding("versions", "ok", f"{text}: tested")
    else:
        remedy = "install versions that have been tested: docs/operations.md#versions"
        yield Finding("versions", "warning", f"{text}: {reason}", remedy)


def check_entry_points() -> Iterator[Finding]:
    """vLLM finds the plug-in by these."""
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    if missing := [group for group in groups if not list(entry_points(group=group, name="score"))]:
        detail = f"the entry point 'score' of {' and '.join(missing)} is missing"
        yield Finding("entry points", "error", detail, "install score-vllm again (make setup)")
    else:
        yield Finding("entry points", "ok", f"score in {' and '.join(groups)}")


def decodable() -> set[str]:
    """Names of the video codecs that the installed FFmpeg has a decoder for."""
    import av

    found = set()
    for name in av.codecs_available:
        with contextlib.suppress(ValueError):  # it only encodes
            found.add(av.Codec(name, "r").canonical_name)
    return found


def check_decoders(loader: str) -> Iterator[Finding]:
    """Codecs of the installed FFmpeg, and a clip read as a request's would be.

    Args:
        loader: ``--video-loader``.
    """
    import av

    from score_vllm.video import VideoError, sandbox
    from score_vllm.video.container import CODECS, DecoderUnavailableError

    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    missing = [name for name in CODECS if name not in decodable()]
    found = f"PyAV {av.__version__}, libavcodec {ffmpeg}: "
    if missing:
        remedy = "install PyAV from its wheel (pip install --force-reinstall --only-binary=:all: av)"
        yield Finding("codecs", "warning", f"{found}no decoder for {', '.join(missing)}", remedy)
    else:
        yield Finding("codecs", "ok", f"{found}all of {', '.join(CODECS)}")
    backend = "decord" if loader == "decord" else "pyav"
    try:
        video = sandbox.decode_video_isolated(demo_clip().read_bytes(), backend=backend)
        yield Finding("decoding", "ok", f"{len(video.frames)} frames of the sample clip by {backend}, in a process")
    except (VideoError, DecoderUnavailableError) as error:
        remedy = "install score-vllm[decord]" if backend == "decord" else "allow processes, file handles and memory"
        yield Finding("decoding", "error", f"the sample clip cannot be read by {backend}: {error}", remedy)


def check_port(host: str | None, port: int) -> Iterator[Finding]:
    """Whether the server could listen there."""
    from score_vllm.catalog import UsageError

    try:
        options.check_port(argparse.Namespace(host=host, port=port, uds=None))
        yield Finding("port", "ok", f"{host or 'all addresses'}, port {port} is free")
    except UsageError as error:
        sentence, _, remedy = str(error).partition("; ")
        yield Finding("port", "error", sentence, remedy)


def check_processes(argv: list[str], timeout: float) -> Iterator[Finding]:
    """What a process that vLLM would start finds; see :mod:`score_vllm.server.doctor_probe`.

    Args:
        argv: the command line of the server.
        timeout: seconds.
    """
    options.allow_plugin()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(theirs, argv, sys.stderr.isatty()), daemon=True)
    process.start()
    theirs.close()
    ended = "took longer than --timeout"
    try:
        while ours.poll(timeout):
            yield Finding(**json.loads(ours.recv_bytes()))
    except EOFError:
        process.join(10)
        ended = f"ended with exit code {process.exitcode}"
        if process.exitcode == 0:
            return
    finally:
        if process.is_alive():
            process.kill()
    yield Finding("vLLM", "error", f"a process with vLLM {ended}", "run it again with VLLM_LOGGING_LEVEL=DEBUG")


def _probe(pipe: Connection, argv: list[str], loud: bool) -> None:
    from score_vllm.server import doctor_probe

    doctor_probe.run(pipe, argv, loud)


def run(argv: list[str], timeout: float, early: argparse.Namespace) -> Iterator[Finding]:
    """Every check, cheapest first; one that breaks is a finding too."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", check_versions),
        ("entry points", check_entry_points),
        ("port", lambda: check_port(early.host, early.port)),
        ("decoding", lambda: check_decoders(early.video_loader)),
        ("vLLM", lambda: check_processes(argv, timeout)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever a broken installation makes of it
            yield Finding(name, "error", f"the check itself failed: {error!r}", "install score-vllm again (make setup)")


def main(argv: list[str]) -> int:
    """0 where no finding is an error, else 1."""
    parser = argparse.ArgumentParser(PROG, USAGE, DESCRIPTION, add_help=True, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for what vLLM is asked (default: 300)")
    own, rest = parser.parse_known_args(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--host", default=None)
    early.add_argument("--port", type=int, default=8000)
    early.add_argument("--video-loader", default="pyav")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    findings: list[Finding] = []
    for finding in run(rest, own.timeout, early.parse_known_args(rest)[0]):
        findings.append(finding)
        if not own.json:
            print(finding, flush=True)
    counts: dict[str, Any] = {state: sum(f.state == state for f in findings) for state in STATES}
    if own.json:
        print(json.dumps({**counts, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(f"\n{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors")
    return int(counts["error"] > 0)
