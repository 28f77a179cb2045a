"""The proof table of docs/videos.md: which readers show the right pictures at the right seconds, kind by kind.

    python -m tests.compare_loaders [--ffmpeg PATH]

ffmpeg is asked for ``-vf fps=2:round=up``, the picture on screen at each half second; vLLM's loader (opencv)
for two frames a second, its clock being index / rate.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from score_vllm.video import decode_video
from tests.video_clips import CASES, KINDS, faults, make
from tests.video_writing import Truth

NAMES = {"matroska": "mkv", "mpegts": "ts"}


def ours(data: bytes, truth: Truth) -> list[str]:
    """What is wrong with our frames."""
    video = decode_video(data)
    return faults(video.frames, video.times, truth)


def vllms(data: bytes, truth: Truth) -> list[str]:
    """What is wrong with those of vLLM's default loader."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    try:
        frames, metadata = VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(data, num_frames=128, fps=2)
    except Exception as error:  # whatever it raises is no answer
        return [f"{type(error).__name__}: {error}"]
    return faults(frames, [i / metadata["fps"] for i in metadata["frames_indices"]], truth)


def ffmpegs(binary: str) -> Callable[[bytes, Truth], list[str]]:
    """The same of an ffmpeg program."""

    def read(data: bytes, truth: Truth) -> list[str]:
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(data)
            command = [
                binary,
                "-v",
                "quiet",
                "-i",
                file.name,
                "-vf",
                "fps=2:round=up",
                "-pix_fmt",
                "rgb24",
                "-f",
                "rawvideo",
                "-",
            ]
            raw = np.frombuffer(subprocess.run(command, capture_output=True, check=False).stdout, np.uint8)
        width, height = truth.size
        if not len(raw) or len(raw) % (width * height * 3):
            return [f"{len(raw)} bytes"]
        frames = raw.reshape(-1, height, width, 3)
        return faults(frames, [i / 2 for i in range(len(frames))], truth)

    return read


def rows(readers: list[Callable[[bytes, Truth], list[str]]]) -> list[list[str]]:
    """A row per kind: its name, and per reader ``yes``, or the containers where it is wrong."""
    lines = []
    for kind in KINDS:
        containers = [container for k, container in CASES if k == kind]
        clips = [make(kind, container) for container in containers]
        line = [kind, ", ".join(NAMES.get(c, c) for c in containers)]
        for reader in readers:
            wrong = [NAMES.get(c, c) for c, clip in zip(containers, clips, strict=True) if reader(*clip)]
            line.append(f"wrong: {', '.join(wrong)}" if wrong else "yes")
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ffmpeg", help="an ffmpeg program, for a column of its own")
    args = parser.parse_args()
    readers, names = [ours, vllms], ["score-vllm", "vLLM's loader"]
    if args.ffmpeg:
        readers, names = [*readers, ffmpegs(args.ffmpeg)], [*names, "`ffmpeg -vf fps=2:round=up`"]
    for line in [["kind", "containers", *names], ["---"] * (len(names) + 2), *rows(readers)]:
        print("| " + " | ".join(line) + " |")  # noqa: T201


if __name__ == "__main__":
    main()
