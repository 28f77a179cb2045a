"""Descriptions of sources, mixtures, and the samples of the shared data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.data.sources import MixedSource, mixed, open_source, source_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "koalla", "path": "x"}, "one of .*jsonl.*did you mean 'koala'"),
        ({"kind": "jsonl"}, "path is missing"),
        ({"kind": "koala", "path": "x"}, "media is missing"),
        ({"kind": "world", "path": "x"}, "unknown key 'source.path'; known: .*limit"),
        ({"kind": "jsonl", "path": "x", "min_clarity": 0.5}, "unknown key 'source.min_clarity'; known: .*fps"),
        ({"kind": "jsonl", "path": "x", "split": "test"}, "split must be one of"),
        ({"kind": "llava-video", "path": "x", "turns": "last"}, "turns must be one of"),
        ({"kind": "jsonl", "path": "x", "held_out": 1.0}, r"held_out must be a number in \[0, 1.*\)"),
        ({"kind": "jsonl", "path": "x", "max_frames": 1}, r"max_frames must be an integer in \[2, inf\)"),
        ({"kind": "jsonl", "path": "x", "max_pixels": 10}, r"max_pixels must be an integer in \[784"),
        ({"kind": "jsonl", "path": "x", "limit": -1}, r"limit must be an integer in \[0, inf\)"),
        ({"kind": "jsonl", "path": "x", "limit": True}, "limit must be an integer"),
        ({"kind": "jsonl", "path": "x", "fps": 0}, r"fps must be a number in \(0"),
        ({"kind": "jsonl", "path": "x", "fps": float("nan")}, r"fps must be a number in \(0, inf\), got nan"),
        ({"kind": "jsonl", "path": 3}, "path must be a string"),
        ({"kind": "world", "weight": 0.0}, r"weight must be a number in \(0"),
        ({"kind": "koala", "path": "x", "media": "y", "min_seconds": 5, "max_seconds": 4}, "max_seconds must be"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_config(**fields)


def test_bad_keys() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'source.pth' \(did you mean 'path'\?\); known: .*'path'"):
        source_config(kind="jsonl", path="y", pth="x")
    with pytest.raises(ValueError, match="source lacks the key 'kind'"):
        source_config(path="x")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file there"):
        open_source(source_config(kind="jsonl", path=str(tmp_path / "none.jsonl")))
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n')
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_source(source_config(kind="jsonl", path=str(tmp_path / "a.jsonl"), media=str(tmp_path / "none")))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no record is left"):
        open_source(source_config(kind="jsonl", path=str(tmp_path), cache=str(tmp_path / "cache")))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['videoID'"):
        open_source(source_config(kind="koala", path=str(tmp_path), media=str(tmp_path), cache=str(tmp_path / "cache")))


def test_shared_samples(shared_dir: Path, tmp_path: Path) -> None:
    """Files in the true formats; their videos point nowhere, which is named."""
    samples, cache = shared_dir / "samples", str(tmp_path)

    def config(kind: str, name: str, **more: str) -> Any:
        return source_config(kind=kind, path=str(samples / name), split="all", cache=cache, **more)

    mc = config("llava-video", "0_30_s_academic_mc_v0_1_qa_processed.json")
    koala = config("koala", "Koala_36M_1.csv", media=str(samples))
    chat = config("llava-video", "sharegpt_video.json")
    for given, target, video in (
        (mc, "A.", "Charades/RW587.mp4"),
        (koala, "A scuba diver, wearing black, swims.", "-KuN4XkUQBI_1.mp4"),
        (chat, "w1 w2 w3 w4 w5 w6", "fFjv93ACGo8.mp4"),
    ):
        source: Any = open_source(given)
        assert source.record(0).target == target
        assert str(source.record(0).video).endswith(video)
        with pytest.raises(BrokenSampleError, match="No such file"):
            source[0]


class Numbers:
    """Samples that name their index; some are broken."""

    def __init__(self, size: int, broken: int = -1) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> TrainingSample:
        if index == self.broken:
            raise BrokenSampleError(f"n{index}: broken")
        return TrainingSample(f"n{index}", np.zeros((2, 4, 4, 3), np.uint8), 2.0, "?", "!")

    def text(self, index: int) -> tuple[str, str]:
        return "?", "!"


def test_mixture_keeps_its_weights_and_repeats_nothing_early() -> None:
    mixed = MixedSource([Numbers(9000), Numbers(700), Numbers(300)], [6, 3, 1], seed=3)
    assert len(mixed) == 10_000
    located = [mixed.locate(i) for i in range(len(mixed))]
    for begin in range(0, 10_000, 1000):
        assert Counter(s for s, _ in located[begin : begin + 1000]) == {0: 600, 1: 300, 2: 100}
    for source, size in enumerate((9000, 700, 300)):
        places = [place for s, place in located if s == source]
        assert places == [i % size for i in range(len(places))]
    assert mixed[5].key == f"{located[5][0]}/n{located[5][1]}"
    assert [mixed.locate(i) for i in range(50)] == located[:50], "by index alone"
    other = MixedSource([Numbers(9000), Numbers(700), Numbers(300)], [6, 3, 1], seed=4)
    assert [other.locate(i) for i in range(50)] != located[:50]
    with pytest.raises(IndexError):
        mixed[10_000]


def test_mixture_of_extreme_weights() -> None:
    mixed = MixedSource([Numbers(5000), Numbers(5000), Numbers(5000)], [1e-9, 1.0, 1e9])
    counts = Counter(mixed.locate(i)[0] for i in range(1000))
    assert counts == {0: 1, 1: 1, 2: 998}


def test_mixture_passes_broken_samples_on_by_name() -> None:
    mixed = MixedSource([Numbers(10), Numbers(10, broken=4)], [1, 1])
    broken = []
    for i in range(len(mixed)):
        try:
            mixed[i]
        except BrokenSampleError as error:
            broken.append(str(error))
    assert set(broken) == {"1/n4: broken"}


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [([], [], "one per source"), ([1], [1, 2], "one per source"), ([1, 0], [1, 1], "empty"), ([1], [0], "weight")],
)
def test_bad_mixtures(sizes: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedSource([Numbers(size) for size in sizes], weights)


def test_several_sources_are_mixed() -> None:
    one, other = Numbers(2), Numbers(3)
    assert mixed([one], [2.0]) is one
    both = mixed([one, other], [1.0, 3.0])
    assert isinstance(both, MixedSource)
    assert len(both) == 5


def test_world_kinds() -> None:
    pytest.importorskip("score_vllm.train.world.scenes")
    for kind in ("world", "world-pseudo"):
        source = open_source(source_config(kind=kind, limit=3))
        assert len(source) == 3
        assert source[2].key != source[1].key
