"""The decoding side of :mod:`score_vllm.video.sandbox`: a small process that forks a child for every video.

Needs nothing but numpy and PyAV. A child lives for one video; memory and time are bounded by the kernel, and it dies
with its parent. What is passed: a socket for words, a sealed file in memory with the video, and one for its frames.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import resource
import select
import signal
import socket
from typing import Any

from score_vllm.video.container import DecodeLimits, VideoDeadlineError, VideoError, VideoWindowError
from score_vllm.video.decode import decode_video
from score_vllm.video.picture import Resize

_PR_SET_PDEATHSIG = 1
# How often the server looks whether its parent still is.
_LOOK_SECONDS = 2.0
# Children that wait for a job, beside those at work.
_SPARES = 2
_PID_BYTES = 4
# Exit status of a child that found the control socket closed.
_PARENT_GONE = 3


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """One message: its length, then JSON."""
    text = json.dumps(message).encode()
    connection.sendall(len(text).to_bytes(8, "big") + text)


def receive(connection: socket.socket) -> dict[str, Any]:
    """The other side's message.

    Raises:
        EOFError: it closed the connection.
    """

    def exactly(size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = connection.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    return json.loads(exactly(int.from_bytes(exactly(8), "big")))


def _limit_memory(extra: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _decode(connection: socket.socket, source: int, target: int) -> None:
    """The child's whole life: limits, one video, the end."""
    order = receive(connection)
    limits = DecodeLimits(**order["limits"])
    # The default action of this signal ends the process even inside a call of the decoder.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.deadline)
    size = os.fstat(source).st_size
    _limit_memory(size + limits.max_memory)

    memory: mmap.mmap | None = None

    def allocate(needed: int) -> mmap.mmap:
        nonlocal memory
        if memory is not None and len(memory) == needed:
            return memory
        send(connection, {"need": needed})
        receive(connection)  # granted, or the end
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (soft + needed, hard))
        os.posix_fallocate(target, 0, needed)  # an error now instead of a signal while the frames are written
        os.ftruncate(target, needed)
        memory = mmap.mmap(target, needed)
        return memory

    data = memoryview(mmap.mmap(source, size, prot=mmap.PROT_READ))
    resize = Resize(**order["resize"]) if order["resize"] else None
    options = {"resize": resize, "limits": limits, "allocate": allocate, **order["options"]}
    try:
        video = decode_video(data, threads=order["threads"], **options)
        if video.damaged and order["threads"] > 1:
            # What a decoder conceals depends on how many threads it has, and these on how busy the server is.
            video = decode_video(data, threads=1, **options)
        send(connection, {"shape": video.frames.shape, "video": video.to_json()})
    except VideoWindowError as error:
        send(connection, {"error": str(error), "field": error.field})
    except VideoDeadlineError as error:
        send(connection, {"error": str(error), "late": True})
    except VideoError as error:
        out = isinstance(error.__cause__, MemoryError)
        text = f"decoding the video needs more than max_memory = {limits.max_memory} bytes" if out else str(error)
        send(connection, {"error": text})
    except OSError as error:
        send(connection, {"unavailable": f"{type(error).__name__}: {error}"})


def _child(control: socket.socket, notify: int) -> int:
    """Wait for a job, do it; the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    message, job, _, _ = socket.recv_fds(control, 1, 3)
    if not message:
        return _PARENT_GONE
    os.write(notify, os.getpid().to_bytes(_PID_BYTES, "big"))
    control.close()
    if not job:
        return 0
    connection = socket.socket(fileno=job[0])
    with contextlib.suppress(EOFError, ConnectionError):
        if len(job) == 3:
            _decode(connection, job[1], job[2])
        else:
            send(connection, {"unavailable": "the job's file descriptors did not all arrive"})
    return 0


def _refuse(control: socket.socket, reason: str) -> None:
    """Answer one waiting job, if there is one, that it cannot be done."""
    with contextlib.suppress(OSError):
        _, job, _, _ = socket.recv_fds(control, 1, 3, socket.MSG_DONTWAIT)
        if job:
            with socket.socket(fileno=job[0]) as connection:
                send(connection, {"unavailable": reason})
        for fd in job[1:]:
            os.close(fd)


class _Spares:
    """Children that wait for a job, so that no request waits for a fork."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._taken, self._notify = os.pipe()
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._idle: set[int] = set()

    def fill(self) -> None:
        while len(self._idle) < _SPARES:
            try:
                pid = os.fork()
            except OSError as error:
                _refuse(self._control, f"no process can be started: {error}")
                return
            if pid == 0:
                status = 1
                try:
                    status = _child(self._control, self._notify)
                finally:
                    os._exit(status)
            self._idle.add(pid)

    def wait(self) -> bool:
        """Wait until a child takes a job or ends; False where the parent closed its end."""
        ready, _, _ = select.select([self._taken, self._wake], [], [], _LOOK_SECONDS)
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._taken in ready:
            pids = os.read(self._taken, 4096)
            self._idle -= {int.from_bytes(pids[i : i + _PID_BYTES], "big") for i in range(0, len(pids), _PID_BYTES)}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._idle.discard(ended[0])
                if os.WIFEXITED(ended[1]) and os.WEXITSTATUS(ended[1]) == _PARENT_GONE:
                    return False
        return True


def main(control_fd: int) -> None:
    """The server process."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end is ours
    spares = _Spares(socket.socket(fileno=control_fd))
    while os.getppid() == parent:
        spares.fill()
        if not spares.wait():
            return
