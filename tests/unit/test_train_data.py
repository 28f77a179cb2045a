"""Sources of video samples: true formats, hand-written files, clips made here."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from score_vllm.train.data import clips as clips_module
from score_vllm.train.data.clips import ClipReader, encode_mp4, fit_within, letterbox
from score_vllm.train.data.koala import parse_timestamps
from score_vllm.train.data.records import RecordSource
from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.train.data.sources import open_source, source_config
from score_vllm.video import decode_video

MC = "What moves?\nA. A square.\nB. A dog.\nPlease respond with only the letter of the correct answer."


def opened(cache: Path, **fields: Any) -> RecordSource:
    source = open_source(source_config(cache=str(cache), **fields))
    assert isinstance(source, RecordSource)
    return source


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


@pytest.fixture
def llava(tmp_path: Path, clips: dict[str, Path]) -> Path:
    """A bucket as it is after extraction, with frame folders and broken records."""
    bucket = tmp_path / "0_30_s_academic_v0_1"
    (bucket / "academic_source").mkdir(parents=True)
    shutil.copy(clips["plain"], bucket / "academic_source" / "a.mp4")
    shutil.copy(clips["truncated"], bucket / "academic_source" / "cut.mp4")
    frames = bucket / "hound" / "v1"
    frames.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (40, 30), (20 * i, 0, 0)).save(frames / f"c01_{i + 1}.jpeg", quality=95)
    records: list[Any] = [
        {
            "id": "same",
            "video": "academic_source/a.mp4",
            "data_source": "0_30_s_academic_v0_1",
            "conversations": [
                turn("system", "Be brief."),
                turn("human", f"<image>\n{MC}"),
                turn("gpt", "A."),
                turn("human", "Where to?"),
                turn("gpt", "To the right."),
            ],
        },
        {"id": "same", "video": "hound/v1", "conversations": [turn("human", "Why?\n<video>"), turn("gpt", "So.")]},
        {"id": "h2", "video": "hound/v1.mp4", "conversations": [turn("human", "<video>Why?"), turn("gpt", "So.")]},
        {"id": "cut", "video": "academic_source/cut.mp4", "conversations": [turn("human", "?"), turn("gpt", "!")]},
        {"id": "gone", "video": "academic_source/gone.mp4", "conversations": [turn("human", "?"), turn("gpt", "!")]},
        {"id": "out", "video": "../../secret.mp4", "conversations": [turn("human", "?"), turn("gpt", "!")]},
        {"id": "mute", "video": "academic_source/a.mp4", "conversations": [turn("human", "?")]},
        {
            "id": "blank",
            "video": "academic_source/a.mp4",
            "conversations": [turn("human", "<image>"), turn("gpt", "!")],
        },
        {"id": "none", "conversations": [turn("human", "?"), turn("gpt", "!")]},
        "not a record",
    ]
    path = bucket / "0_30_s_academic_oe_v0_1_qa_processed.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def test_llava_video(llava: Path, tmp_path: Path, clips: dict[str, Path]) -> None:
    source = opened(tmp_path / "cache", kind="llava-video", path=str(llava), split="all")
    assert len(source) == 10
    sample = source[0]
    assert sample.prompt == MC
    assert sample.target == "A.", "letters stay as they are"
    assert sample.key == f"{llava.name}@3:academic_source/a.mp4"
    expected = decode_video(clips["plain"].read_bytes())
    np.testing.assert_array_equal(sample.frames, expected.frames)
    assert sample.fps == pytest.approx(1 / expected.step)
    folder = source[1]
    assert (folder.prompt, folder.target) == ("Why?", "So.")
    assert folder.fps == 2.0
    reds = folder.frames[:, 5, 5, 0].astype(int)
    assert np.abs(reds - 20 * np.arange(12)).max() < 4, "twelve frames at two a second, in the order of their numbers"
    np.testing.assert_array_equal(source[2].frames, folder.frames)
    for index, reason in {
        3: "cut.mp4.*(container|cannot|no frame)",
        4: "cannot read .*gone.mp4",
        5: "leads out of the media folder",
        6: "no turn of a human",
        7: "human's turn is empty",
        8: "video must be a path",
        9: "must be a JSON object",
    }.items():
        with pytest.raises(BrokenSampleError, match=reason) as caught:
            source[index]
        assert str(caught.value).startswith(f"{llava.name}@"), "names the record"
    for index in (-1, 10):
        with pytest.raises(IndexError):
            source[index]


def test_llava_video_all_turns_and_other_roots(llava: Path, tmp_path: Path) -> None:
    source = opened(tmp_path / "cache", kind="llava-video", path=str(llava), split="all", turns="all")
    assert [source.record(i).target for i in range(2)] == ["A.", "To the right."]
    assert len({source.record(i).key for i in range(2)}) == 2
    root = opened(tmp_path / "cache", kind="llava-video", path=str(llava), media=str(tmp_path))
    assert root[0].frames.shape[0] > 1, "found below the folder of its bucket"


def test_splits_never_share_a_video(tmp_path: Path) -> None:
    """By video, over files and ids."""
    for kind in ("cap", "oe"):
        records = [
            {"id": f"{kind}{i}", "video": f"v/{i // 3}.mp4", "conversations": [turn("human", "?"), turn("gpt", "!")]}
            for i in range(300)
        ]
        (tmp_path / f"x_{kind}_processed.json").write_text(json.dumps(records))
    parts = {}
    for split in ("train", "held_out", "all"):
        source = opened(
            tmp_path / "cache", kind="llava-video", path=str(tmp_path), task="all", split=split, held_out=0.2
        )
        parts[split] = [source.record(i) for i in range(len(source))]
    videos = {split: {r.video for r in records} for split, records in parts.items()}
    assert not videos["train"] & videos["held_out"]
    assert videos["train"] | videos["held_out"] == videos["all"]
    assert len(parts["train"]) + len(parts["held_out"]) == len(parts["all"]) == 600
    assert 0.1 < len(videos["held_out"]) / 100 < 0.3
    assert len({r.key for r in parts["all"]}) == 600
    again = opened(
        tmp_path / "cache2", kind="llava-video", path=str(tmp_path), task="all", split="held_out", held_out=0.2
    )
    assert [again.record(i) for i in range(len(again))] == parts["held_out"]


KOALA_HEADER = (
    "videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,video_training_suitability_score"
)
SPAN = "['0:00:27.233', '0:00:31.533']"


@pytest.fixture
def koala(tmp_path: Path, clips: dict[str, Path]) -> Path:
    media = tmp_path / "clips"
    media.mkdir()
    shutil.copy(clips["plain"], media / "-Ku_N4XkUQBI_1.mp4")
    shutil.copy(clips["odd"], media / "b_0.mkv")
    path = tmp_path / "Koala_36M_1.csv"
    with path.open("w", newline="") as file:
        file.write(KOALA_HEADER + "\n")
        writer = csv.writer(file)
        for row in (
            ["-Ku_N4XkUQBI_1", "u", SPAN, 'A diver, "black",\nswims.\n\nThen, it ends.', 0.9, 5.3, 22.0, 4.4],
            ["b_0", "u", "['0:01:00', '0:01:09']", "Short stamps.", 0.2, 3.0, 1.0, 2.6],
            ["c_0", "u", SPAN, "No clip.", 0.8, "", 1.0, 4.0],
            ["b_1", "u", "['0:00:09.0', '0:00:01.0']", "Backwards.", 0.9, 5.0, 1.0, 4.0],
            ["../b_0", "u", SPAN, "Outside.", 0.9, 5.0, 1.0, 4.0],
            ["b_2", "u", SPAN],
        ):
            writer.writerow(row)
    return path


def test_koala(koala: Path, tmp_path: Path) -> None:
    common = {"kind": "koala", "path": str(koala), "media": str(tmp_path / "clips"), "split": "all"}
    source = opened(tmp_path / "cache", **common)
    assert len(source) == 6
    assert source[0].target == 'A diver, "black",\nswims.\n\nThen, it ends.'
    assert source[0].prompt == "Describe this video in detail."
    assert source[0].key.endswith(":-Ku_N4XkUQBI_1")
    assert source[1].frames.shape[1:] == (98, 130, 3), "other containers too"
    for index, reason in {2: "c_0.mp4", 3: "in order", 4: "videoID must be", 5: "3 fields"}.items():
        with pytest.raises(BrokenSampleError, match=reason):
            source[index]

    def kept(**filters: Any) -> list[str]:
        """First words of the rows that can be read."""
        filtered, words = opened(tmp_path / "cache", **common, **filters), []
        for i in range(len(filtered)):
            with contextlib.suppress(BrokenSampleError):
                words.append(filtered.record(i).target.split()[0])
        return words

    assert kept() == ["A", "Short", "No"]
    assert kept(min_clarity=0.85) == ["A"]
    assert kept(min_aesthetic=2.9) == ["A", "Short"], "a score that is no number passes no filter"
    assert kept(present_only=True) == ["A", "Short"]
    assert kept(max_seconds=5) == ["A", "No"]
    assert kept(min_seconds=5) == ["Short"]
    assert opened(tmp_path / "cache", **common, prompt="Say.").record(0).prompt == "Say."
    present = opened(tmp_path / "cache", **common, present_only=True)
    assert len(present) == 3, "two clips, and the row that cannot be read"
    assert len(opened(tmp_path / "cache", **common, min_training_suitability=4.1)) == 2


def test_koala_rows_of_a_whole_video_read_their_time_span(tmp_path: Path, clips: dict[str, Path]) -> None:
    media = tmp_path / "clips"
    media.mkdir()
    shutil.copy(clips["plain"], media / "a_b.mp4")
    path = tmp_path / "Koala_36M_1.csv"
    row = "a_b_7,u,\"['0:00:02.000', '0:00:04.500']\",Late part.,0.9,5.3,22.0,4.4\n"
    path.write_text(f"{KOALA_HEADER}\n{row}")
    for present_only in (False, True):
        source = opened(
            tmp_path / "cache", kind="koala", path=str(path), media=str(media), split="all", present_only=present_only
        )
        assert source.record(0).video.name == "a_b.mp4"
        expected = decode_video(clips["plain"].read_bytes(), start=2.0, end=4.5)
        np.testing.assert_array_equal(source[0].frames, expected.frames)
        assert source[0].fps == pytest.approx(1 / expected.step)


def test_jsonl_rows_may_name_a_part_of_the_video(tmp_path: Path, clips: dict[str, Path]) -> None:
    lines = [
        {"video": str(clips["plain"]), "caption": "x", **more} for more in ({"start": 1, "end": 3.5}, {"end": "x"})
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = opened(tmp_path / "cache", kind="jsonl", path=str(tmp_path / "a.jsonl"), split="all")
    np.testing.assert_array_equal(source[0].frames, decode_video(clips["plain"].read_bytes(), start=1, end=3.5).frames)
    with pytest.raises(BrokenSampleError, match=r"end must be seconds >= 0, got 'x'"):
        source[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SPAN, (27.233, 31.533)),
        ("['1:00:00', '1:00:02']", (3600.0, 3602.0)),
        ('["0:00:00.5","10:00:00.25"]', (0.5, 36000.25)),
    ],
)
def test_timestamps(text: str, expected: tuple[float, float]) -> None:
    assert parse_timestamps(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "[]", "['0:00:01']", "['0:00:02', '0:00:01']", "__import__('os')"])
def test_bad_timestamps(text: str) -> None:
    with pytest.raises(ValueError, match="timestamp must hold"):
        parse_timestamps(text)


def test_jsonl(tmp_path: Path, clips: dict[str, Path]) -> None:
    shutil.copy(clips["plain"], tmp_path / "a.mp4")
    lines = [
        json.dumps({"video": "a.mp4", "prompt": "<video>\nWhat?", "caption": "This.", "more": 1}),
        "",
        json.dumps({"video": str(clips["odd"]), "target": " That. "}),
        '{"video": "a.mp4", ',
        json.dumps({"video": "a.mp4", "caption": 7}),
        json.dumps({"video": "a.mp4", "caption": "x", "target": "y"}),
        json.dumps({"video": "a.mp4", "prompt": "What?"}),
        json.dumps(["a.mp4"]),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    source = opened(tmp_path / "cache", kind="jsonl", path=str(path), prompt="Tell me.", split="all")
    assert [(source[i].prompt, source[i].target) for i in (0, 1)] == [("What?", "This."), ("Tell me.", "That.")]
    for index, reason in {2: "valid JSON", 3: "caption must be", 4: "differ", 5: "empty", 6: "JSON object"}.items():
        with pytest.raises(BrokenSampleError, match=reason):
            source[index]


@pytest.mark.parametrize("name", ["audio", "empty", "not_a_video", "playlist", "truncated"])
def test_broken_videos_are_broken_samples(name: str, clips: dict[str, Path]) -> None:
    with pytest.raises(BrokenSampleError, match=f"sample 7: .*{clips[name].name}"):
        ClipReader().read(clips[name], "sample 7")


def test_odd_videos_work_as_the_server_treats_them(clips: dict[str, Path], shared_videos: Path) -> None:
    for path in (*sorted(shared_videos.iterdir()), clips["odd"], clips["one_pixel_wide"], clips["one_frame"]):
        clip = ClipReader(max_pixels=1 << 24).read(path, path.name)
        expected = decode_video(path.read_bytes())
        frames = expected.frames
        if path == clips["one_frame"]:
            frames = np.repeat(frames, 2, axis=0)  # what the model's processor makes of it
        np.testing.assert_array_equal(clip.frames, frames)


def test_frames_are_bounded(clips: dict[str, Path]) -> None:
    clip = ClipReader(max_frames=6, max_pixels=100 * 100).read(clips["plain"], "x")
    assert clip.frames.shape == (6, 84, 112, 3)
    small = ClipReader(max_pixels=120 * 160).read(clips["plain"], "x")
    assert small.frames.shape[1:] == (120, 160, 3), "small enough frames keep their size"


@pytest.mark.parametrize("size", [(1080, 1920), (3000, 20), (20, 3000), (333, 334)])
@pytest.mark.parametrize("most", [28 * 28, 10_000, 602_112])
def test_fit_within(size: tuple[int, int], most: int) -> None:
    height, width = fit_within(*size, most)
    assert height * width <= most
    if size[0] * size[1] > most:
        assert height % 28 == width % 28 == 0
    else:
        assert (height, width) == size


def test_letterbox_keeps_the_shape() -> None:
    tall = np.full((60, 20, 3), 200, np.uint8)
    out = letterbox(tall, (30, 50))
    assert out.shape == (30, 50, 3)
    assert (out[:, 20:30] == 200).all()
    assert (out[:, :20] == 0).all()
    assert (out[:, 30:] == 0).all()


def test_frame_folders_that_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokenSampleError, match="no frames"):
        ClipReader().read(tmp_path, "x")
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    with pytest.raises(BrokenSampleError, match=r"frame 2\.png: the picture cannot be decoded"):
        ClipReader().read(tmp_path, "x")
    monkeypatch.setattr(clips_module, "DecodeLimits", None)
    with pytest.raises(ValueError, match="40x30 pixels, more than 100"):
        clips_module.decode_picture((tmp_path / "1.png").read_bytes(), 100)


def test_encode_mp4() -> None:
    frames = np.zeros((6, 33, 47, 3), np.uint8)
    frames[3:] = 200
    back = decode_video(encode_mp4(frames, 2.0), fps=0)
    assert back.frames.shape == (6, 34, 48, 3)
    assert back.source_fps == pytest.approx(2.0)
    assert np.abs(back.frames[:, :33, :47].astype(int) - frames).max() < 8
