"""Decoding in a process of its own: the same frames, and limits that hold whatever FFmpeg does."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from score_vllm.video import DecodeLimits, VideoError, decode_video, sandbox
from score_vllm.video.sandbox import decode_video_isolated

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


@pytest.mark.parametrize("name", ["empty", "not_a_video", "playlist", "audio", "truncated"])
def test_broken_files_are_refused_in_words(name: str, clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match=r"video|file"):
        decode(clips[name].read_bytes())


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


def test_a_crashed_server_process_is_started_again(clips: dict[str, Path]) -> None:
    data = clips["plain"].read_bytes()
    decode(data)
    server = sandbox.start()
    server._process.kill()
    server._process.wait()
    assert len(decode(data)) == 12
    assert sandbox.start() is not server


def test_the_server_process_ends_with_its_parent(clips: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from score_vllm.video import sandbox\n"
        "server = sandbox.start()\n"
        "server.connect().close()\n"
        "print(server._process.pid, server._folder, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid, folder = done.stdout.split()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(folder).exists(), "nothing may be left behind"


def test_stop_leaves_nothing_behind() -> None:
    server = sandbox.start()
    server.connect().close()
    folder = Path(server._folder)
    sandbox.stop()
    assert not server.is_alive()
    assert not folder.exists()
