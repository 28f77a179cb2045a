"""Every kind of file that goes wrong somewhere, in every container that allows it: the right pictures at the right
seconds. Clips are generated (tests/video_clips.py) and carry their picture's number; the shared ones are read too."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from score_vllm.video import DecodeLimits, VideoError, decode_video, walk
from score_vllm.video.container import CODECS
from tests.video_clips import CASES, faults, make
from tests.video_writing import TICK, Recipe, encode, even, number_of, numbered, recipe, stream_of, truth_of, write

# Encoder, container, pixel format; one real file for every accepted codec.
ENCODERS = {
    "h264": ("libx264", "mp4", "yuv420p"),
    "hevc": ("libx265", "mp4", "yuv420p"),
    "av1": ("libsvtav1", "mp4", "yuv420p"),
    "vp8": ("libvpx", "webm", "yuv420p"),
    "vp9": ("libvpx-vp9", "webm", "yuv420p"),
    "mpeg4": ("mpeg4", "mp4", "yuv420p"),
    "mpeg2video": ("mpeg2video", "mpeg", "yuv420p"),
    "mpeg1video": ("mpeg1video", "mpeg", "yuv420p"),
    "mjpeg": ("mjpeg", "avi", "yuvj420p"),
    "msmpeg4v2": ("msmpeg4v2", "avi", "yuv420p"),
    "msmpeg4v3": ("msmpeg4", "avi", "yuv420p"),
    "wmv1": ("wmv1", "asf", "yuv420p"),
    "wmv2": ("wmv2", "asf", "yuv420p"),
    "h263": ("h263", "3gp", "yuv420p"),
    "flv1": ("flv", "flv", "yuv420p"),
    "prores": ("prores_ks", "mov", "yuv422p10le"),
    "qtrle": ("qtrle", "mov", "rgb24"),
    "gif": ("gif", "gif", "rgb8"),
    "apng": ("apng", "apng", "rgb24"),
}
SHARED = {  # name: frames, first and last number, duration
    "cut1s.mp4": (4, 200, 220, 1.08),
    "editlist_trim.mp4": (12, 40, 95, 6.0),
    "browser_share.webm": (120, 0, 259, 59.5),
    "browser_slowstart.webm": (18, 0, 105, 9.0),
    "vfr_screen.webm": (46, 0, 55, 23.0),
    "vfr_screen.mp4": (46, 0, 55, 22.93),
    "size_change_vp8.webm": (20, 0, 95, 10.0),
    "two_video.mp4": (20, 0, 95, 10.0),
    "anim.avif": (4, 0, 7, 1.0),
    "anim.gif": (4, 0, 15, 2.0),
    "ts_concat_overlap.ts": (20, 0, 95, 10.0),
    "ts_jump.ts": (20, 0, 95, 10.0),
    "wmv2.wmv": (20, 0, 95, 10.0),
    "qtrle.mov": (4, 0, 15, 2.0),
    "size_3840x16.mp4": (4, 0, 15, 2.0),
}


@pytest.mark.parametrize(("kind", "container"), CASES)
def test_the_pictures_on_screen_at_their_seconds(kind: str, container: str) -> None:
    data, truth = make(kind, container)
    video = decode_video(data)
    assert faults(video.frames, video.times, truth) == []
    assert video.duration == pytest.approx(truth.duration, abs=0.11)
    assert video.total_frames == len(truth.stamps)
    assert truth.warning in " ".join(video.warnings)
    assert bool(video.warnings) == bool(truth.warning), video.warnings
    if len(truth.stamps) > 1:
        # Even in time; only the picture that completes the last cell may come early.
        np.testing.assert_allclose(np.diff(video.times)[:-1], video.step, atol=1e-6)
        assert video.times[-1] - video.times[-2] <= video.step + 1e-6
    if truth.duration < 3:
        return
    part = decode_video(data, start=1.3, end=2.9)
    assert faults(part.frames, part.times, truth)[1:] == [], "only the end may be missing"
    assert part.times[0] == pytest.approx(1.3)
    assert part.times[-1] < 2.9
    later = decode_video(data, start=truth.duration - 1.5)
    assert faults(later.frames, later.times, truth, size_matters=kind != "size change") == []
    several = decode_video(data, fps=None, max_frames=10, temporal_merge=1)
    assert faults(several.frames, several.times, truth) == []
    assert len(several.times) == 10


def test_every_accepted_codec_has_a_clip() -> None:
    assert {*ENCODERS, "theora"} == set(CODECS)


@pytest.mark.parametrize("codec", ENCODERS)
def test_every_accepted_codec_is_read(codec: str) -> None:
    encoder, container, pix_fmt = ENCODERS[codec]
    rate = 25 if "video" in codec else 10
    options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
    size = (176, 144) if codec == "h263" else (192, 128)
    made = Recipe(container, encoder, even(20, rate), codec_options=options, pix_fmt=pix_fmt, size=size, rate=rate)
    data, truth = write(made), truth_of(made)
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.video[0].codec_context.codec.canonical_name == codec
    video = decode_video(data, fps=None, max_frames=8)
    if codec == "h263":  # its pixels are 12:11, and a player shows them so
        truth.size = (192, 144)
    assert faults(video.frames, video.times, truth) == []
    assert len(video.frames) == 8


def test_theora_is_read() -> None:
    """PyAV's FFmpeg reads it and cannot write it."""
    video = decode_video((Path(__file__).parents[1] / "assets" / "theora.ogv").read_bytes(), fps=None)
    assert [number_of(p) for p in video.frames] == list(range(10))


def test_codecs_that_are_not_accepted_are_named() -> None:
    data = write(Recipe("matroska", "ffv1", even(5, 10), pix_fmt="yuv420p"))
    with pytest.raises(VideoError, match="video codec 'ffv1' is not accepted; accepted are h264, "):
        decode_video(data)


@pytest.mark.parametrize("name", SHARED)
def test_shared_inputs(name: str, shared_dir: Path) -> None:
    path = shared_dir / "videos_hard" / name
    if not path.exists():
        pytest.skip("no shared inputs here")
    frames, first, last, duration = SHARED[name]
    video = decode_video(path.read_bytes())
    numbers = [number_of(picture) for picture in video.frames]
    assert (len(numbers), numbers[0], numbers[-1]) == (frames, first, last)
    assert video.duration == pytest.approx(duration, abs=0.05)
    assert numbers == sorted(numbers)
    assert len(video.frames) * video.step == pytest.approx(duration, abs=0.51)


@pytest.mark.parametrize(("name", "bits"), [("hflip.mp4", slice(None, None, -1)), ("transpose.mp4", None)])
def test_shared_mirrors(name: str, bits: slice | None, shared_dir: Path) -> None:
    path = shared_dir / "videos_hard" / name
    if not path.exists():
        pytest.skip("no shared inputs here")
    frames = decode_video(path.read_bytes()).frames
    back = [frame[:, bits] if bits else frame.transpose(1, 0, 2) for frame in frames]
    assert [number_of(picture) for picture in back] == list(range(0, 100, 5))


@pytest.mark.parametrize("turns", range(4))
def test_turns_are_those_of_pyav(turns: int) -> None:
    """A second opinion on the direction."""
    matrix = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    data, _ = make(f"orientation {matrix}", "mp4")
    with av.open(io.BytesIO(data)) as opened:
        frame = next(opened.decode(video=0))
        expected = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    np.testing.assert_array_equal(decode_video(data, max_frames=1).frames[0], expected)


def test_a_turned_phone_is_fitted_with_its_shape_kept(shared_dir: Path) -> None:
    path = shared_dir / "videos_hard" / "size_turn_vp8.webm"
    if not path.exists():
        pytest.skip("no shared inputs here")
    frames = decode_video(path.read_bytes()).frames
    assert frames.shape == (20, 240, 320, 3)
    assert (frames[-1][:, :60] < 20).all(), "bars on both sides"
    assert (frames[-1][:, -60:] < 20).all()
    assert number_of(np.asarray(Image.fromarray(frames[-1][:, 70:250]).resize((240, 320)))) == 95


def webp(durations: list[int], **options: Any) -> bytes:
    pictures = [Image.fromarray(numbered(i)) for i in range(len(durations))]
    sink = io.BytesIO()
    pictures[0].save(sink, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    return sink.getvalue()


def test_animated_webp() -> None:
    data = webp([100] * 20 + [500] * 10)
    video = decode_video(data)
    assert [number_of(p) for p in video.frames] == [0, 5, 10, 15, *range(20, 30)]
    assert (video.duration, video.total_frames, video.warnings) == (7.0, 30, ())
    assert [number_of(p) for p in decode_video(data, start=3.0, end=5.0).frames] == [22, 23, 24, 25]
    for limits in ({"max_source_frames": 5}, {"max_duration": 2}, {"max_pixels": 100}):
        with pytest.raises(VideoError, match=next(iter(limits))):
            decode_video(data, limits=DecodeLimits(**limits))


def test_a_damaged_webp() -> None:
    data = webp([100] * 20)
    for cut in (20, 60, len(data) // 2):
        try:
            warnings = decode_video(data[:cut]).warnings
        except VideoError:
            continue
        assert warnings


def test_pixels_that_are_not_square() -> None:
    """As players show them: 4:3 pixels make 256 columns of 192."""
    sink = io.BytesIO()
    made = recipe("mp4", even(20, 10))
    with av.open(sink, "w", format="mp4") as out:
        stream = stream_of(out, made, "libx264")
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for packet in encode(stream, made):
            out.mux(packet)
    video = decode_video(sink.getvalue())
    assert (video.frames.shape[1:3], video.source_size) == ((128, 256), (256, 128))
    assert [number_of(p) for p in video.frames] == [0, 5, 10, 15]


def test_interlaced_video_is_said_to_be() -> None:
    made = Recipe("mpegts", "mpeg2video", even(50, 25), rate=25, codec_options={"flags": "+ildct+ilme", "top": "1"})
    sink = io.BytesIO()
    with av.open(sink, "w", format="mpegts") as out:
        stream = stream_of(out, made, "mpeg2video")
        for packet in encode(stream, made):
            out.mux(packet)
    video = decode_video(sink.getvalue())
    assert [number_of(p) for p in video.frames] == [0, 12, 25, 37]
    assert any("interlaced" in warning for warning in video.warnings)


@pytest.mark.parametrize("height", [144, 1080])
def test_untagged_colour_is_bt601(height: int) -> None:
    """At every size, as FFmpeg and the loaders built on it have it; a tag is followed."""
    made = Recipe("mp4", "libx264", [0.0], size=(16, height))
    red = np.full((height, 16, 3), (200, 30, 30), np.uint8)
    for tagged in (False, True):
        sink = io.BytesIO()
        with av.open(sink, "w", format="mp4") as out:
            stream = stream_of(out, made, "libx264")
            stream.codec_context.options = {"crf": "1"}
            space = 1 if tagged else 5
            if tagged:
                stream.codec_context.colorspace = 1
            frame = av.VideoFrame.from_ndarray(red, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space)
            if not tagged:
                frame.colorspace = 2
            frame.pts, frame.time_base = 0, TICK
            for packet in stream.encode(frame) + stream.encode(None):
                out.mux(packet)
        got = decode_video(sink.getvalue()).frames[0].reshape(-1, 3).mean(0)
        assert np.abs(got - (200, 30, 30)).max() < 6, (tagged, got)


def test_transparent_parts_are_black() -> None:
    pictures = [Image.new("RGBA", (64, 48), (255, 255, 255, 0)) for _ in range(4)]
    for i, picture in enumerate(pictures):
        picture.paste((250, 10, 10, 255), (i, 0, i + 30, 20))
    for kind in ("PNG", "WEBP"):
        sink = io.BytesIO()
        pictures[0].save(sink, kind, save_all=True, append_images=pictures[1:], duration=300, lossless=True)
        frame = decode_video(sink.getvalue()).frames[0]
        assert (frame[30:] == 0).all()
        assert frame[5, 5].tolist() == [250, 10, 10]


def test_damage_that_the_decoder_conceals_is_said(clips: dict[str, Path]) -> None:
    data = bytearray(clips["plain"].read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    video = decode_video(bytes(data))
    assert len(video.frames) == 12
    assert "the file is damaged" in " ".join(video.warnings)


def test_a_truncated_recording_is_said_to_be() -> None:
    data = write(recipe("matroska", even(60, 10)))
    video = decode_video(data[: len(data) * 2 // 3])
    assert 1 < video.duration < 5
    assert video.warnings


def test_a_window_costs_the_same_at_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in packets given to the decoder, which no other work on the machine can change."""
    data = write(recipe("mp4", even(3000, 10), size=(48, 32)))
    fed = [0]
    original = walk.Walker._decode

    def counted(self: walk.Walker, packets: Any, ordinal: int, begin: int) -> Any:
        def count() -> Any:
            for packet in packets:
                fed[0] += 1
                yield packet

        return original(self, count(), ordinal, begin)

    monkeypatch.setattr(walk.Walker, "_decode", counted)
    cost = []
    for start in (10.0, 280.0):
        fed[0] = 0
        assert len(decode_video(data, start=start, end=start + 10).frames) == 20
        cost.append(fed[0])
    assert max(cost) <= 2 * min(cost)
    assert max(cost) < 150


def test_reading_reopens_a_file_that_cannot_be_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    data, truth = make("B-frames", "mp4")
    monkeypatch.setattr(walk.Walker, "_seek", lambda self, key: False)
    for options in ({}, {"start": 3.0}, {"fps": None, "max_frames": 7}):
        video = decode_video(data, **options)
        assert faults(video.frames, video.times, truth) == []
