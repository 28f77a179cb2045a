from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from score_vllm.video import container
from score_vllm.video import decode as video_module
from score_vllm.video.decode import DecodeLimits, VideoError, decode_video, probe_video
from score_vllm.video.sampling import sample_frame_indices


@given(st.integers(1, 5000), st.floats(0.1, 240), st.floats(0, 60), st.integers(-1, 800))
def test_indices_are_ascending_and_in_range(total: int, source_fps: float, fps: float, limit: int) -> None:
    indices = sample_frame_indices(total, source_fps, fps, limit)
    assert indices[0] == 0
    assert all(a < b for a, b in itertools.pairwise(indices))
    assert indices[-1] <= total - 1
    assert len(indices) == 1 or len(indices) % 2 == 0
    if limit > 1:
        assert len(indices) <= limit
    if len(indices) > 1:
        assert indices[-1] == total - 1


@pytest.mark.parametrize(
    ("total", "source_fps", "fps", "limit", "expected"),
    [
        (300, 30.0, 2.0, 128, 20),  # ten seconds at two frames a second
        (108000, 30.0, 2.0, 128, 128),  # an hour: the limit
        (30, 30.0, 2.0, 128, 4),  # one second: at least four
        (3, 30.0, 2.0, 128, 2),  # what there is, made even
        (1, 30.0, 2.0, 128, 1),
        (100, float("nan"), 2.0, 128, 8),  # unknown rate counts as 24
        (100, 0.0, 0.0, 10, 10),  # no limit by rate
        (101, 25.0, 0.0, 0, 100),  # no limit at all
    ],
)
def test_how_many(total: int, source_fps: float, fps: float, limit: int, expected: int) -> None:
    assert len(sample_frame_indices(total, source_fps, fps, limit)) == expected


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="total_frames"):
        sample_frame_indices(0, 30, 2, 128)


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
    assert decoded.indices == sample_frame_indices(50, 10.0, 0, frames)
    levels = decoded.frames.reshape(len(decoded.indices), -1).mean(1)
    assert np.abs(levels - (4 + 5 * np.asarray(decoded.indices))).max() < 2.5
    assert decoded.fps == pytest.approx(10, rel=0.01)
    assert decoded.duration == pytest.approx(5, rel=0.05)


def test_ordinary_files_are_read_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback decodes everything; the usual mp4 must not need it."""
    clip = numbered_clip(tmp_path / "clip.mp4", 50, "libx264")
    monkeypatch.setattr(video_module, "_read_in_order", lambda *_: pytest.fail("fell back to decoding everything"))
    assert len(decode_video(clip.read_bytes(), fps=0, max_frames=6).indices) == 6


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
    with pytest.raises(VideoError):
        probe_video(clips[name].read_bytes(), DecodeLimits())


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
    original = video_module._upright_rgb

    def slow(frame: object, limits: DecodeLimits) -> np.ndarray:
        frames_after.append(clock[0])
        clock[0] += 40.0
        return original(frame, limits)

    monkeypatch.setattr(video_module, "_upright_rgb", slow)
    with pytest.raises(VideoError, match="deadline = 60 s"):
        decode_video(clips["plain"].read_bytes(), limits=DecodeLimits(deadline=60))
    assert frames_after == [0.0, 40.0]


def test_damaged_middle_still_gives_frames(clips: dict[str, Path]) -> None:
    data = bytearray(clips["plain"].read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = bytes(400)
    decoded = decode_video(bytes(data))
    assert 1 <= len(decoded.indices) == len(decoded.frames)
