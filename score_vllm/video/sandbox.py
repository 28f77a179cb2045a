"""Decoding in processes of their own: memory and time that a file cannot exceed, whatever FFmpeg does with it.

A limit inside the process helps only between two calls of the decoder. A file may make a single call allocate
gigabytes or never return; here the kernel refuses the memory, and its alarm ends the process. One server process has
everything imported and forks a child per video (:mod:`score_vllm.video.decode_server`), as many at once as there are
cores. It is reached through an inherited pair of sockets, videos and frames pass through shared memory, and all of it
ends with this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from score_vllm.video.container import (
    DecodeLimits,
    DecoderUnavailableError,
    VideoDeadlineError,
    VideoError,
    VideoWindowError,
    check_size,
)
from score_vllm.video.decode_server import receive, send
from score_vllm.video.gate import Gate
from score_vllm.video.picture import Resize
from score_vllm.video.result import DecodedVideo
from score_vllm.video.sampling import check_sampling

# The package itself imports torch, which decoding does not need: without it the server starts in half a second.
_BOOT = (
    "import sys, types; package = types.ModuleType('score_vllm'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['score_vllm'] = package; from score_vllm.video.decode_server import main; main(int(sys.argv[2]))"
)
_MOST_THREADS = 4
# A child that neither answers nor is ended by its alarm (a stopped process) is given up after this many seconds more.
_GRACE = 2.0
# Somebody may have ended the child or the server; a file that crashes the decoder does so every time.
_TRIES = 3
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class _DecodeServer:
    """The parent's handle on the server process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            folder = str(Path(__file__).resolve().parents[1])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, folder, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def submit(self, *fds: int) -> None:
        socket.send_fds(self._control, [b"j"], list(fds))

    def stop(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


_server: _DecodeServer | None = None
_server_lock = threading.Lock()
_gate = Gate(len(os.sched_getaffinity(0)), 64, None)


def configure(*, workers: int | None = None, max_queued: int = 64, max_bytes_in_flight: int | None = None) -> None:
    """Set how much is decoded at once by this process; before the first video.

    Args:
        workers: children at once; None: as many as there are cores.
        max_queued: videos that may wait for one; another gets a :class:`DecoderBusyError`.
        max_bytes_in_flight: bytes of encoded videos in work plus those of frames that somebody still holds; None: no
            bound.
    """
    global _gate
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value in (
        ("workers", workers),
        ("max_queued", max_queued),
        ("max_bytes_in_flight", 1 if max_bytes_in_flight is None else max_bytes_in_flight),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    _gate = Gate(workers, max_queued, max_bytes_in_flight)


def start() -> _DecodeServer:
    """Start the server process, once; does not wait for it. A server calls this before the first video comes."""
    global _server
    with _server_lock:
        if _server is not None and not _server.is_alive():
            _server.stop()
            _server = None
        if _server is None:
            _server = _DecodeServer()
        return _server


def stop() -> None:
    """End the server process and its children, if there are any."""
    global _server
    with _server_lock:
        if _server is not None:
            _server.stop()
            _server = None


def _forget() -> None:
    """A forked copy of this process starts a server of its own."""
    global _server, _server_lock, _gate
    _server, _server_lock = None, threading.Lock()
    _gate = Gate(_gate.workers, _gate.max_queued, _gate.max_bytes)


os.register_at_fork(after_in_child=_forget)


def decode_video_isolated(
    data: bytes,
    *,
    resize: Resize | None = None,
    limits: DecodeLimits | None = None,
    backend: str = "pyav",
    **options: Any,
) -> DecodedVideo:
    """:func:`~score_vllm.video.decode.decode_video` in a child process with hard limits.

    Args:
        data: the file's bytes.
        resize: deliver the size that the model's processor will choose.
        limits: what the file may cost; ``max_memory`` and ``deadline`` are enforced by the kernel, and the deadline
            covers waiting for a free child.
        backend: ``pyav`` or ``decord``.
        options: the sampling arguments of ``decode_video``.

    Returns:
        The frames and their times; the frames lie in memory that the child wrote.

    Raises:
        VideoError: as :func:`decode_video`, or the child met its memory limit or its deadline, or crashed.
        VideoWindowError: as :func:`decode_video`.
        DecoderBusyError: the queue is full, or no child was free in time.
        DecoderUnavailableError: this machine cannot decode now (descriptors, memory, processes).
        ValueError: decord is asked for and not installed, or a sampling argument is out of range.
    """
    limits = limits or DecodeLimits()
    check_sampling(**{name: value for name, value in options.items() if name not in ("start", "end")})
    check_size(data, limits)
    if backend == "decord" and importlib.util.find_spec("decord") is None:
        raise ValueError("video_backend 'score_decord' needs: pip install 'score-vllm[decord]'")
    end = time.monotonic() + limits.deadline
    gate = _gate
    active = gate.enter(len(data), limits.deadline)
    try:
        job = _Job(
            data, resize, limits, backend, options, end, gate, max(1, min(_MOST_THREADS, gate.workers // active))
        )
        for _ in range(_TRIES):
            with contextlib.suppress(EOFError):
                return job.run()
            job.check_time()
        if not start().is_alive():
            raise DecoderUnavailableError("the video decoding process does not start; see its output")
        raise VideoError(
            f"the decoder was ended on this video {_TRIES} times: it is damaged, or needs more than "
            f"max_memory = {limits.max_memory} bytes"
        )
    finally:
        gate.leave()
        gate.give_back(len(data))


class _Job:
    """One video on its way through a child."""

    def __init__(
        self,
        data: bytes,
        resize: Resize | None,
        limits: DecodeLimits,
        backend: str,
        options: dict[str, Any],
        end: float,
        gate: Gate,
        threads: int,
    ) -> None:
        self._data, self._limits, self._end, self._gate = data, limits, end, gate
        self._order = {
            "options": {**options, "backend": backend},
            "resize": resize.to_json() if resize else None,
            "threads": threads,
        }

    def check_time(self) -> None:
        """Raises: VideoDeadlineError: it is over."""
        if time.monotonic() >= self._end:
            raise VideoDeadlineError(self._limits.deadline)

    def run(self) -> DecodedVideo:
        """Hand the job to the server and wait.

        Raises:
            EOFError: the child or the server ended without a word.
        """
        with contextlib.ExitStack() as stack:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                stack.enter_context(ours)
                with theirs:
                    source = _memory(stack, "score-video")
                    _write(source, self._data)
                    target = _memory(stack, "score-frames")
                    try:
                        start().submit(theirs.fileno(), source, target)
                    except (BrokenPipeError, ConnectionError) as error:
                        raise EOFError from error
            except OSError as error:
                raise DecoderUnavailableError(f"the video cannot be handed to the decoder: {error}") from error
            return self._talk(ours, target)

    def _talk(self, connection: socket.socket, target: int) -> DecodedVideo:
        left = max(0.05, self._end - time.monotonic())
        connection.settimeout(left + _GRACE)
        limits = {name: getattr(self._limits, name) for name in self._limits.__dataclass_fields__}
        held = 0
        try:
            send(connection, {**self._order, "limits": {**limits, "deadline": left}})
            answer = receive(connection)
            while "need" in answer:
                self._gate.grow(answer["need"], len(self._data) + held, max(0.0, self._end - time.monotonic()))
                held += answer["need"]
                send(connection, {"granted": True})
                answer = receive(connection)
            if "video" not in answer:
                raise self._error(answer)
            memory = _map(target, math.prod(answer["shape"]), connection)
            weakref.finalize(memory, self._gate.give_back, held)
            held = 0
            frames = np.frombuffer(memory, np.uint8).reshape(answer["shape"])
            return DecodedVideo.from_json(frames, answer["video"])
        except TimeoutError as error:
            raise VideoDeadlineError(self._limits.deadline) from error
        except (BrokenPipeError, ConnectionError) as error:
            raise EOFError from error
        finally:
            if held:
                self._gate.give_back(held)

    def _error(self, answer: dict[str, Any]) -> Exception:
        if "unavailable" in answer:
            return DecoderUnavailableError(f"the video cannot be decoded on this machine now: {answer['unavailable']}")
        if "field" in answer:
            return VideoWindowError(answer["field"], answer["error"])
        if "late" in answer:  # the child's deadline was what was left of ours
            return VideoDeadlineError(self._limits.deadline)
        return VideoError(answer["error"])


def _memory(stack: contextlib.ExitStack, name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    return fd


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _map(fd: int, size: int, connection: socket.socket) -> mmap.mmap:
    """The frames, once the child has ended and can no longer touch them."""
    while connection.recv(1 << 16):
        pass
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    if os.fstat(fd).st_size != size:
        raise DecoderUnavailableError("the decoding process delivered frames of another size than it said")
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
