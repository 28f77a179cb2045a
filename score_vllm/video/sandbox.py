"""Decoding in a process of its own: memory and time that a file cannot exceed, whatever FFmpeg does with it.

A limit inside the process helps only between two calls of the decoder. A file may make a single call allocate
gigabytes or never return; here the kernel refuses the memory, and its alarm ends the process.

One small server process (``python -m score_vllm.video.sandbox``) has everything imported and forks a child per
video, some 20 ms each. It ends when its parent does: it waits for the end of its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from score_vllm.video.container import DecodeLimits, VideoError, VideoWindowError
from score_vllm.video.decode import decode_video
from score_vllm.video.picture import Resize
from score_vllm.video.result import DecodedVideo

_CHUNK = 64 << 20


class _DecodeServer:
    """The parent's handle on the server process."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="score-decode-")
        self._address = str(Path(self._folder) / "socket")
        command = [sys.executable, "-m", "score_vllm.video.sandbox", self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ready = threading.Lock()
        self._is_ready = False

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def connect(self) -> Connection:
        with self._ready:
            if not self._is_ready:
                assert self._process.stdout is not None
                if self._process.stdout.readline().strip() != b"ready":
                    raise RuntimeError("the video decoding process did not start; see its output above")
                self._is_ready = True
        return Client(self._address, family="AF_UNIX")

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


_server: _DecodeServer | None = None
_server_lock = threading.Lock()


def start() -> _DecodeServer:
    """Start the server process, once; does not wait for it. A server calls this before the first video comes."""
    global _server
    with _server_lock:
        if _server is None or not _server.is_alive():
            _server = _DecodeServer()
        return _server


def stop() -> None:
    """End the server process, if there is one."""
    global _server
    with _server_lock:
        if _server is not None:
            _server.stop()
            _server = None


def decode_video_isolated(
    data: bytes, *, resize: Resize | None = None, limits: DecodeLimits | None = None, **options: Any
) -> DecodedVideo:
    """:func:`~score_vllm.video.decode.decode_video` in a child process with hard limits.

    Args:
        data: the file's bytes.
        resize: deliver the size that the model's processor will choose.
        limits: what the file may cost; ``max_memory`` and ``deadline`` are enforced by the kernel.
        options: the sampling arguments of ``decode_video``.

    Returns:
        The frames and their times.

    Raises:
        VideoError: as :func:`decode_video`, or the child met its memory limit or its deadline, or crashed.
        VideoWindowError: as :func:`decode_video`.
    """
    limits = limits or DecodeLimits()
    if not data or len(data) > limits.max_bytes:
        return decode_video(data, limits=limits, **options)  # refuses it
    values = {name: getattr(limits, name) for name in limits.__dataclass_fields__}
    order = {
        "options": options,
        "resize": resize.to_json() if resize else None,
        "limits": values,
        "bytes": len(data),
    }
    with start().connect() as connection:
        try:
            connection.send_bytes(json.dumps(order).encode())
            _send_all(connection, memoryview(data))
            return _receive(connection)
        except (EOFError, ConnectionError) as error:
            raise VideoError(
                f"the decoder was ended on this video: it is damaged, takes longer than deadline = {limits.deadline:g} "
                f"s, or needs more than max_memory = {limits.max_memory} bytes"
            ) from error


def _send_all(connection: Connection, view: memoryview) -> None:
    for begin in range(0, len(view), _CHUNK):
        connection.send_bytes(view[begin : begin + _CHUNK])


def _receive_all(connection: Connection, view: memoryview) -> None:
    for begin in range(0, len(view), _CHUNK):
        connection.recv_bytes_into(view[begin : begin + _CHUNK])


def _receive(connection: Connection) -> DecodedVideo:
    header = json.loads(connection.recv_bytes())
    if "field" in header:
        raise VideoWindowError(header["field"], header["error"])
    if "error" in header:
        raise VideoError(header["error"])
    frames = np.empty(header.pop("shape"), dtype=np.uint8)
    _receive_all(connection, frames.data.cast("B"))
    return DecodedVideo.from_json(frames, header)


def _serve_one(connection: Connection) -> None:
    """The child's whole life: limits, one video, the end."""
    order: dict[str, Any] = json.loads(connection.recv_bytes())
    limits = DecodeLimits(**order["limits"])
    # The default action of this signal ends the process even inside a call of the decoder.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.deadline)
    data = bytearray(order["bytes"])
    _receive_all(connection, memoryview(data))
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.max_memory, hard))
    try:
        resize = Resize(**order["resize"]) if order["resize"] else None
        video = decode_video(bytes(data), resize=resize, limits=limits, **order["options"])
    except VideoWindowError as error:
        connection.send_bytes(json.dumps({"error": str(error), "field": error.field}).encode())
        return
    except VideoError as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    except MemoryError:
        text = f"decoding the video needs more than max_memory = {limits.max_memory} bytes"
        connection.send_bytes(json.dumps({"error": text}).encode())
        return
    # Time from here on is the reader's.
    signal.setitimer(signal.ITIMER_REAL, 0)
    header = {"shape": video.frames.shape, **video.to_json()}
    connection.send_bytes(json.dumps(header).encode())
    _send_all(connection, video.frames.data.cast("B"))


def _end_with_parent(folder: Path) -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(address: str) -> None:
    """The server process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end is ours
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    threading.Thread(target=_end_with_parent, args=(Path(address).parent,), daemon=True).start()
    with Listener(address, family="AF_UNIX", backlog=64) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection = listener.accept()
            if os.fork() == 0:
                with contextlib.suppress(BrokenPipeError, EOFError, ConnectionError):
                    _serve_one(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
