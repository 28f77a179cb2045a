"""Decoding in a process of its own: the same frames, and limits that hold whatever FFmpeg does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from score_vllm.train.data.clips import encode_mp4
from score_vllm.video import (
    DecodeLimits,
    DecoderBusyError,
    DecoderUnavailableError,
    Resize,
    VideoError,
    VideoWindowError,
    decode_video,
    gate,
    sandbox,
)
from score_vllm.video.sandbox import decode_video_isolated
from tests.video_clips import CASES, faults, make

MEBIBYTE = 1 << 20


def decode(data: bytes, **limits: float) -> np.ndarray:
    return decode_video_isolated(data, fps=2, max_frames=128, limits=DecodeLimits(**limits)).frames


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full(kind: bytes, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">B3s", 0, flags.to_bytes(3, "big")), *parts)


def index_bomb(samples: int) -> bytes:
    """An mp4 of some 650 bytes that claims this many samples of one byte: FFmpeg allocates an index for all of them."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    sizes = struct.pack(">HH", 64, 64) + struct.pack(">IIIH", 0x480000, 0x480000, 0, 1)
    entry = box(
        b"mp4v", b"\0" * 6 + struct.pack(">H", 1) + b"\0" * 16 + sizes + b"\0" * 32 + struct.pack(">Hh", 24, -1)
    )
    tables = box(
        b"stbl",
        full(b"stsd", 0, struct.pack(">I", 1), entry),
        full(b"stts", 0, struct.pack(">III", 1, samples, 1)),
        full(b"stsc", 0, struct.pack(">IIII", 1, 1, samples, 1)),
        full(b"stsz", 0, struct.pack(">II", 1, samples)),
        full(b"stco", 0, struct.pack(">II", 1, 40)),
    )
    reference = full(b"dref", 0, struct.pack(">I", 1), full(b"url ", 1))
    information = box(b"minf", full(b"vmhd", 1, b"\0" * 8), box(b"dinf", reference), tables)
    media = box(
        b"mdia",
        full(b"mdhd", 0, struct.pack(">IIIIHH", 0, 0, 1000, samples, 0, 0)),
        full(b"hdlr", 0, b"\0" * 4 + b"vide" + b"\0" * 12 + b"v\0"),
        information,
    )
    header = struct.pack(">IIIII", 0, 0, 1, 0, samples) + b"\0" * 16 + matrix + struct.pack(">II", 64 << 16, 64 << 16)
    track = box(b"trak", full(b"tkhd", 3, header), media)
    movie = struct.pack(">IIIIIH", 0, 0, 1000, samples, 0x10000, 0x100) + b"\0" * 10 + matrix + b"\0" * 24
    return (
        box(b"ftyp", b"isom\0\0\2\0isommp41")
        + box(b"mdat", b"\0" * 64)
        + box(b"moov", full(b"mvhd", 0, movie + struct.pack(">I", 2)), track)
    )


def test_same_frames_as_in_process(clips: dict[str, Path]) -> None:
    for name in ("plain", "odd", "one_frame"):
        data = clips[name].read_bytes()
        here, there = decode_video(data), decode_video_isolated(data, fps=2, max_frames=128, limits=DecodeLimits())
        assert np.array_equal(here.frames, there.frames)
        assert here.to_json() == there.to_json()


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_damaged_frames_do_not_depend_on_how_many_threads_are_free(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders of several threads conceal damage in another way: the same file gave other frames on an idle server."""
    monkeypatch.setattr(sandbox, "_gate", gate.Gate(workers, 1, None))
    noise = np.random.default_rng(0).integers(0, 256, (96, 480, 3), dtype=np.uint8)
    whole = encode_mp4(np.stack([noise[:, 2 * i : 2 * i + 128] for i in range(96)]), 8.0)
    damaged = 0
    for percent, length in ((40, 400), (55, 16), (60, 16), (70, 200)):
        at = len(whole) * percent // 100
        data = whole[:at] + bytes(length) + whole[at + length :]
        expected, got = decode_video(data), decode_video_isolated(data)
        damaged += expected.damaged
        np.testing.assert_array_equal(got.frames, expected.frames)
        assert got.warnings == expected.warnings
        del got
        assert sandbox._gate.held == 0
    assert damaged


@pytest.mark.parametrize("name", ["empty", "not_a_video", "playlist", "audio", "truncated"])
def test_broken_files_are_refused_in_the_same_words(name: str, clips: dict[str, Path]) -> None:
    data = clips[name].read_bytes()
    with pytest.raises(VideoError) as here:
        decode_video(data)
    with pytest.raises(VideoError) as there:
        decode(data)
    assert str(here.value) == str(there.value)


def test_a_small_file_cannot_take_gigabytes(clips: dict[str, Path]) -> None:
    """The claim is checked on this process too: it is the parent that must stay small."""
    bomb = index_bomb(60_000_000)
    assert len(bomb) < 1000
    before = int(Path("/proc/self/statm").read_text().split()[1])
    with pytest.raises(VideoError):
        decode(bomb, max_memory=256 * MEBIBYTE)
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 64 * MEBIBYTE
    assert len(decode(clips["plain"].read_bytes())) == 12, "the next video decodes"


def test_the_deadline_ends_a_call_that_does_not_return(clips: dict[str, Path]) -> None:
    """Opening this file is one call of FFmpeg that takes seconds: no check between calls could end it."""
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"deadline = 0\.2 s"):
        decode(index_bomb(60_000_000), deadline=0.2)
    assert time.monotonic() - start < 10
    assert len(decode(clips["plain"].read_bytes())) == 12


def processes_below(pid: int) -> set[int]:
    """Living descendants of a process."""
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z" and int(fields[1]) == pid:
                found |= {int(stat.parent.name), *processes_below(int(stat.parent.name))}
    return found


def gone(pids: set[int], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def wait_for_spares(server: sandbox._DecodeServer) -> set[int]:
    end = time.monotonic() + 60
    while len(children := processes_below(server._process.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return children


def test_a_server_process_that_was_killed_is_started_again(clips: dict[str, Path]) -> None:
    data = clips["plain"].read_bytes()
    decode(data)
    server = sandbox.start()
    children = wait_for_spares(server)
    os.kill(server._process.pid, signal.SIGKILL)
    assert len(decode(data)) == 12, "noticed or not, the next video decodes"
    assert sandbox.start() is not server
    assert gone(children), "its children end with it"


def test_a_child_that_was_killed_is_replaced(clips: dict[str, Path]) -> None:
    data = clips["plain"].read_bytes()
    decode(data)
    for _ in range(3):
        for pid in wait_for_spares(sandbox.start()):
            with contextlib.suppress(ProcessLookupError):  # one of the last round, not gone yet when it was listed
                os.kill(pid, signal.SIGKILL)
        assert len(decode(data)) == 12


def test_a_child_killed_at_work_costs_a_second_try(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decode(clips["plain"].read_bytes())
    server, killed = sandbox.start(), []
    original = gate.Gate.grow

    def grow(self: gate.Gate, size: int, own: int, timeout: float) -> None:
        if not killed:
            killed.extend(processes_below(server._process.pid))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        original(self, size, own, timeout)

    monkeypatch.setattr(gate.Gate, "grow", grow)
    assert len(decode(clips["plain"].read_bytes())) == 12
    assert killed
    assert sandbox.start() is server
    assert sandbox._gate.active == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exit", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_behind(way: str, clips: dict[str, Path]) -> None:
    code = (
        "import os, sys, time\n"
        "from score_vllm.video import sandbox\n"
        f"sandbox.decode_video_isolated(open({str(clips['plain'])!r}, 'rb').read())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "os._exit(0)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    below = processes_below(parent.pid)
    assert below
    if way == "exit":
        parent.stdin.write("\n")
        parent.stdin.flush()
    else:
        os.killpg(parent.pid, getattr(signal, way)) if way == "SIGTERM" else parent.kill()
    parent.wait(30)
    assert gone(below)


def test_stop_leaves_nothing_behind(clips: dict[str, Path]) -> None:
    decode(clips["plain"].read_bytes())
    server = sandbox.start()
    pids = {server._process.pid, *wait_for_spares(server)}
    sandbox.stop()
    assert gone(pids)
    assert not server.is_alive()


def test_a_forked_process_has_a_server_of_its_own(clips: dict[str, Path]) -> None:
    """Data loaders of training fork."""
    decode(clips["plain"].read_bytes())
    mine = sandbox.start()
    pid = os.fork()
    if pid == 0:
        fine = len(decode(clips["plain"].read_bytes())) == 12 and sandbox.start() is not mine
        sandbox.stop()
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert mine.is_alive()


def test_no_descriptors_left_is_not_the_files_fault(clips: dict[str, Path]) -> None:
    data = clips["plain"].read_bytes()
    decode(data)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(DecoderUnavailableError, match="Too many open files"):
            decode(data)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert len(decode(data)) == 12


def test_what_the_child_cannot_have_is_not_the_files_fault(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full /dev/shm, as the child sees it: its memory for frames is refused."""
    original = os.memfd_create

    def tiny(name: str, flags: int) -> int:
        fd = original(name, flags)
        if name == "score-frames":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return fd

    monkeypatch.setattr(os, "memfd_create", tiny)
    with pytest.raises(DecoderUnavailableError, match="Operation not permitted"):
        decode(clips["plain"].read_bytes())


def test_more_videos_than_may_wait_are_refused_at_once(clips: dict[str, Path]) -> None:
    bounded = gate.Gate(workers=1, max_queued=1, max_bytes=None)
    assert bounded.enter(10, 1) == 1
    waiting = threading.Thread(target=bounded.enter, args=(10, 30))
    waiting.start()
    while not bounded.waiting:
        time.sleep(0.01)
    with pytest.raises(DecoderBusyError) as caught:
        bounded.enter(10, 30)
    assert caught.value.retry_after >= 1
    bounded.leave()
    waiting.join(30)
    assert bounded.active == 1
    with pytest.raises(DecoderBusyError):
        bounded.enter(10, 0.01)


def test_bytes_in_flight_are_bounded_until_the_frames_are_let_go(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clips["plain"].read_bytes()
    monkeypatch.setattr(sandbox, "_gate", gate.Gate(2, 4, 1_000_000))
    first = decode(data)
    assert sandbox._gate.held == first.nbytes == 12 * 120 * 160 * 3
    view = first[3:]
    del first
    with pytest.raises(DecoderBusyError):
        decode(data, deadline=0.5)
    del view
    assert sandbox._gate.held == 0
    assert len(decode(data)) == 12


def test_frames_can_be_written_to_by_their_owner(clips: dict[str, Path]) -> None:
    frames = decode(clips["plain"].read_bytes())
    frames[0] = 7
    assert (frames[0] == 7).all()


def test_many_at_once(clips: dict[str, Path]) -> None:
    data = clips["plain"].read_bytes()
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: decode(data), range(32)))
    assert all(np.array_equal(results[0], other) for other in results)
    assert sandbox._gate.active == 0


def test_concealed_damage_crosses_over(clips: dict[str, Path]) -> None:
    """With several decoder threads FFmpeg's words are read from standard error."""
    data = bytearray(clips["plain"].read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    assert "the file is damaged" in " ".join(decode_video_isolated(bytes(data)).warnings)
    assert decode_video_isolated(clips["plain"].read_bytes()).warnings == ()


DECORD = [(kind, container) for kind, container in CASES if container in ("mp4", "matroska", "avi", "mpegts")]


@pytest.mark.parametrize(("kind", "container"), DECORD)
def test_decord_reads_what_it_reads_rightly(kind: str, container: str) -> None:
    """The rest is read with PyAV, which a warning says; nothing hangs, and no picture is wrong."""
    pytest.importorskip("decord")
    data, truth = make(kind, container)
    video = decode_video_isolated(data, backend="decord")
    assert faults(video.frames, video.times, truth) == []
    fallen_back = any("instead of decord" in warning for warning in video.warnings)
    if kind in ("constant rate", "fragmented") and container == "mp4":
        assert not fallen_back
    if kind in ("edit list", "joined", "two streams", "orientation (0, 1, -1, 0)"):
        assert fallen_back


def test_the_window_error_crosses_over(clips: dict[str, Path]) -> None:
    with pytest.raises(VideoWindowError, match=r"start must be in \[0, 6\.000\)") as caught:
        decode_video_isolated(clips["plain"].read_bytes(), start=60.0)
    assert caught.value.field == "start"


def test_resize_crosses_over(clips: dict[str, Path]) -> None:
    rule = Resize(factor=28, min_pixels=28 * 28, max_pixels=100 * 100)
    video = decode_video_isolated(clips["plain"].read_bytes(), resize=rule)
    assert video.frames.shape[1:3] == rule.size(12, 120, 160)
    assert video.source_size == (160, 120)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"max_queued": 0}, {"max_bytes_in_flight": -1}, {"workers": True}])
def test_configure_checks(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        sandbox.configure(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1e5}, r"fps must be None or in \[0, 1000\], got 100000"),
        ({"max_frames": -1}, "max_frames must be >= 0"),
    ],
)
def test_a_wrong_argument_is_not_the_files_fault(
    options: dict[str, float], message: str, clips: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        decode_video_isolated(clips["plain"].read_bytes(), **options)
    assert not isinstance(caught.value, VideoError)
