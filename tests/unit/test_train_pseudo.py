"""Pseudo-videos from parquet files made here."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from score_vllm.train.data import pseudo
from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.train.data.sources import open_source, source_config

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def png(shade: int, size: tuple[int, int] = (56, 28)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


def encoded(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def row(i: int, **changes: Any) -> dict[str, Any]:
    """Row i has shade i and caption 'shade i.'."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"shade {i}."}]
    usual = {"id": f"r{i}", "image": {"bytes": png(i), "path": None}, "conversations": talk, "data_source": "made"}
    return {**usual, **changes}


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("data_source", pa.string()),
    ]
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    def make(rows: list[dict[str, Any]], group: int = 1000, name: str = "train-0.parquet", **fields: Any) -> Any:
        folder = tmp_path / "aokvqa(cauldron,llava_format)"
        folder.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / name, row_group_size=group)
        fields = {"split": "all", "subsets": ["all"], "cache": str(tmp_path / "cache"), **fields}
        return open_source(source_config(kind="onevision-pseudo", path=str(folder), **fields))

    return make


def runs(frames: np.ndarray) -> list[tuple[int, int]]:
    """(shade, length) of each run of equal frames, by the middle pixel."""
    shades = frames[:, frames.shape[1] // 2, frames.shape[2] // 2, 0]
    cuts = np.flatnonzero(np.diff(shades)) + 1
    return [(int(piece[0]), len(piece)) for piece in np.split(shades, cuts)]


@pytest.mark.parametrize("group", [1000, 7])
def test_clips_are_what_the_paper_describes(group: int, make: Callable[..., Any]) -> None:
    source = make([row(i) for i in range(40)], group)
    assert len(source) == 40
    counts, lengths = set(), set()
    for i in range(40):
        sample = source[i]
        stills = runs(sample.frames)
        assert stills[0][0] == i, "sample i begins with row i"
        captions = [int(n) for n in re.findall(r"shade (\d+)\.", sample.target)]
        assert captions == [shade for shade, _ in stills], "captions in the order of the images"
        assert len(set(captions)) == len(captions)
        assert sample.fps == 2.0
        counts.add(len(stills))
        lengths |= {length for _, length in stills}
    assert counts == {2, 3, 4}
    assert lengths == {4, 6}


def test_repeats_are_multiples_of_the_models_merge() -> None:
    counts = {merge: pseudo.repeat_counts(merge) for merge in (1, 2, 3, 4, 8)}
    assert counts == {1: [3, 4, 5, 6], 2: [4, 6], 3: [3, 6], 4: [4], 8: [8]}


def test_within_a_still_the_towers_tokens_do_not_change(make: Callable[..., Any], tiny_model: Path) -> None:
    """Paper, figure 4: residuals are zero within a still and large between stills."""
    from score_vllm.vision.tower import VisionTower

    tower = VisionTower(tiny_model)
    pictures = np.random.default_rng(0).integers(0, 255, (9, 56, 84, 3), dtype=np.uint8)
    source = make([row(i, image={"bytes": encoded(p), "path": None}) for i, p in enumerate(pictures)])
    for i in range(4):
        frames = source[i].frames
        x, grid = tower.encode(frames)
        changes = (frames[2::2] != frames[:-2:2]).any((1, 2, 3))
        residual = (x[1:] - x[:-1]).abs().amax(dim=(1, 2)).numpy()
        assert len(residual) == grid.t - 1
        assert (residual[~changes] == 0).all()
        assert (residual[changes] > 0.1).all()
        assert 1 <= changes.sum() <= 3


def test_the_same_index_is_the_same_clip(make: Callable[..., Any]) -> None:
    rows = [row(i) for i in range(40)]
    one, two, other = make(rows), make(rows), make(rows, seed=1)
    for i in (0, 17, 39):
        np.testing.assert_array_equal(one[i].frames, two[i].frames)
        assert one[i].target == two[i].target
    assert any(one[i].target != other[i].target for i in range(10))


def test_broken_rows_are_named_and_never_companions(make: Callable[..., Any]) -> None:
    rows = [row(i) for i in range(12)]
    rows[1] = row(1, image=None)
    rows[2] = row(2, conversations=[{"from": "human", "value": "?"}])
    rows[3] = row(3, image={"bytes": b"\x89PNG nothing", "path": None})
    rows[4] = row(4, image={"bytes": None, "path": "far.png"})
    rows[5] = row(5, image={"bytes": png(5)[:40], "path": None})
    rows[6] = row(6, conversations=None)
    source = make(rows)
    for i, reason in {1: "no image", 2: "no answer", 3: "decoded", 4: "no bytes", 5: "decoded", 6: "no answer"}.items():
        with pytest.raises(BrokenSampleError, match=f"parquet#{i}:r{i}: .*{reason}"):
            source[i]
    for i in (0, *range(7, 12)):
        assert not {shade for shade, _ in runs(source[i].frames)} & {1, 2, 3, 4, 5, 6}


def test_images_beside_the_file(make: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "near.png").write_bytes(png(0))
    rows = [row(0, image={"bytes": None, "path": "near.png"}), row(1), row(2, image={"bytes": None, "path": "../x"})]
    source = make(rows, media=str(tmp_path))
    assert runs(source[0].frames)[0][0] == 0
    with pytest.raises(BrokenSampleError, match="leads out"):
        source[2]


def test_a_row_alone_is_broken(make: Callable[..., Any]) -> None:
    with pytest.raises(BrokenSampleError, match="no second usable image"):
        make([row(0), row(1, image=None)])[0]


def test_companions_beyond_the_window(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo, "WINDOW_ROWS", 2)
    source = make([row(i) for i in range(10)], group=5)
    stills = {i: {shade for shade, _ in runs(source[i].frames)} for i in range(10)}
    assert all(len(found) >= 2 for found in stills.values())
    assert any(max(found) - min(found) > 1 for found in stills.values())


def test_one_size(make: Callable[..., Any]) -> None:
    rows = [
        row(0, image={"bytes": png(9, (100, 60)), "path": None}),
        row(1, image={"bytes": png(200, (30, 60)), "path": None}),
    ]
    frames = make(rows)[0].frames
    assert frames.shape[1:] == (60, 100, 3)
    assert (frames[-1, :, 35:65, 0] == 200).all(), "the tall image stands in the middle"
    assert (frames[-1, :, :35] == 0).all()
    large = [row(i, image={"bytes": png(9, (1000, 600)), "path": None}) for i in range(2)]
    assert make(large, max_pixels=10_000)[0].frames.shape[1:] == (56, 112, 3)


def test_splits_share_no_image(make: Callable[..., Any]) -> None:
    rows = [row(i) for i in range(60)]
    seen: dict[str, set[int]] = {}
    for split in ("train", "held_out"):
        source = make(rows, group=20, split=split, held_out=0.3)
        seen[split] = {shade for i in range(len(source)) for shade, _ in runs(source[i].frames)}
    assert not seen["train"] & seen["held_out"]
    assert seen["train"] | seen["held_out"] == set(range(60))


def test_several_files_and_limit(make: Callable[..., Any]) -> None:
    make([row(i) for i in range(5)], name="train-00000-of-00002.parquet")
    source = make([row(i) for i in range(100, 105)], name="train-00001-of-00002.parquet")
    assert [runs(source[i].frames)[0][0] for i in range(len(source))] == [*range(5), *range(100, 105)]
    assert len({source[i].key for i in range(10)}) == 10
    assert len(make([row(0)], limit=3)) == 3
    with pytest.raises(IndexError):
        source[10]


def test_files_that_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a parquet file"):
        open_source(source_config(kind="onevision-pseudo", path=str(path)))
    parquet.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match=r"lacks the columns \['conversations', 'image'\]"):
        open_source(source_config(kind="onevision-pseudo", path=str(path)))
    parquet.write_table(pa.table({"id": ["a"], "conversations": ["b"], "image": ["c"]}), path)
    with pytest.raises(ValueError, match="image must be a struct"):
        open_source(source_config(kind="onevision-pseudo", path=str(path)))


def test_a_damaged_page_is_a_broken_sample(make: Callable[..., Any], tmp_path: Path) -> None:
    make([row(i) for i in range(20)], group=10)
    (path,) = tmp_path.rglob("*.parquet")
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(bytes(data))
    source = open_source(source_config(kind="onevision-pseudo", path=str(path), split="all"))
    with pytest.raises(BrokenSampleError, match="parquet#0"):
        source[0]


def test_shared_sample(shared_dir: Path) -> None:
    path = shared_dir / "samples" / "onevision_train-00000-of-00001.parquet"
    source = open_source(source_config(kind="onevision-pseudo", path=str(path), split="all"))
    assert len(source) == 2
    with pytest.raises(BrokenSampleError, match=r"000000033471.*no second usable image"):
        source[0]
    with pytest.raises(BrokenSampleError, match=r"text_000001.*no image"):
        source[1]
