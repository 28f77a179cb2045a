from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from score_vllm.video import DecodeLimits, VideoError, container, decode_video, picture, walk


def numbered_clip(path: Path, count: int, codec: str) -> Path:
    """Frame i is grey level 4 + 5 * i: a decoded frame tells its own index."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        stream.max_b_frames = 2
        stream.bit_rate = 4_000_000
        for i in range(count):
            picture = np.full((48, 64, 3), 4 + 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", ".mp4"), ("libx264", ".mp4"), ("libx264", ".mkv"), ("mpeg2video", ".ts")]
)
@pytest.mark.parametrize("frames", [4, 10, 50])
def test_the_frames_read_are_the_frames_asked_for(codec: str, suffix: str, frames: int, tmp_path: Path) -> None:
    """Through key-frame seeks and B-frames, each returned picture is the one its index names."""
    clip = numbered_clip(tmp_path / f"clip{suffix}", 50, codec)
    decoded = decode_video(clip.read_bytes(), fps=0, max_frames=frames)
    assert decoded.total_frames == 50
    assert len(decoded.frames) == frames
    levels = decoded.frames.reshape(frames, -1).mean(1)
    numbers = np.floor(decoded.times * 10 + 0.01)
    assert np.abs(levels - (4 + 5 * numbers)).max() < 2.5
    assert decoded.source_fps == pytest.approx(10, rel=0.01)
    assert decoded.duration == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_ordinary_files_are_read_by_seeking(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback decodes everything; the usual files must not need it."""
    clip = numbered_clip(tmp_path / f"clip{suffix}", 50, "libx264")
    opened = []
    original = walk.Walker._seek

    def seek(self: walk.Walker, key: int) -> bool:
        opened.append(original(self, key))
        return opened[-1]

    monkeypatch.setattr(walk.Walker, "_seek", seek)
    assert len(decode_video(clip.read_bytes(), fps=0, max_frames=6).frames) == 6
    assert all(opened)
    assert len(opened) >= 4


def test_every_shared_video_decodes(shared_videos: Path) -> None:
    shapes = {p.name: decode_video(p.read_bytes()).frames.shape for p in sorted(shared_videos.iterdir())}
    assert shapes["nasa_13013.mp4"] == (26, 180, 320, 3)
    assert shapes["video_90.mov"][1:] == (568, 320, 3), "a phone's rotation must be applied"
    assert all(shape[0] >= 1 for shape in shapes.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "0 bytes"),
        ("not_a_video", "accepted container"),
        ("playlist", "accepted container"),
        ("audio", "no video stream"),
        ("truncated", "accepted container|cannot|no frame"),
    ],
)
def test_broken_files(name: str, message: str, clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match=message):
        decode_video(clips[name].read_bytes())


def test_concat_scripts_cannot_open_files(tmp_path: Path, clips: dict[str, Path]) -> None:
    """FFmpeg's concat and hls demuxers open what a file names: they must not be reached."""
    for text in (
        f"ffconcat version 1.0\nfile {clips['plain']}\n",
        f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clips['plain']}\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(VideoError, match="accepted container"):
            decode_video(text.encode())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 100}, "max_bytes = 100"),
        ({"max_pixels": 100}, "max_pixels = 100"),
        ({"max_source_frames": 5}, "max_source_frames = 5"),
        ({"max_duration": 0.5}, "max_duration = 0.5"),
        ({"max_output_bytes": 1000}, "max_output_bytes = 1000"),
        ({"deadline": 1e-9}, "deadline"),
    ],
)
def test_limits(limits: dict, message: str, clips: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match=message):
        decode_video(clips["plain"].read_bytes(), limits=DecodeLimits(**limits))


@pytest.mark.parametrize("bad", [0, -1, True, "10"])
def test_bad_limits(bad: object) -> None:
    with pytest.raises(ValueError, match="max_pixels"):
        DecodeLimits(max_pixels=bad)  # type: ignore[arg-type]


def test_the_deadline_ends_the_work(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Time runs out in the middle of decoding: no frame after that is touched."""
    clock, frames_after = [0.0], []
    monkeypatch.setattr(container.time, "monotonic", lambda: clock[0])
    original = picture.Painter.paint

    def slow(self: picture.Painter, frame: object, out: np.ndarray) -> None:
        frames_after.append(clock[0])
        clock[0] += 40.0
        original(self, frame, out)

    monkeypatch.setattr(picture.Painter, "paint", slow)
    with pytest.raises(VideoError, match="deadline = 60 s"):
        decode_video(clips["plain"].read_bytes(), limits=DecodeLimits(deadline=60))
    assert frames_after == [0.0, 40.0]


def test_damaged_middle_still_gives_frames(clips: dict[str, Path]) -> None:
    data = bytearray(clips["plain"].read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = bytes(400)
    decoded = decode_video(bytes(data))
    assert len(decoded.frames) == 12


def test_an_unknown_backend_is_refused(clips: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \['pyav', 'decord'\], got 'opencv'"):
        decode_video(clips["plain"].read_bytes(), backend="opencv")
