"""Datasets under their true names: what a training run reads of them by default."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from score_vllm.train.data.config import CAPTION_SUBSETS
from score_vllm.train.data.record_index import sample_rows
from score_vllm.train.data.sources import open_source, source_config

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

CAPTION = "A man in a red jacket walks into a bright kitchen, opens the fridge and takes out a carton of milk."


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


@pytest.fixture
def llava_video(tmp_path: Path) -> Path:
    """Two buckets of LLaVA-Video-178K; the question files come first in the order of paths."""
    root = tmp_path / "LLaVA-Video-178K"
    for bucket, short in (("0_30_s_academic_v0_1", "0_30_s_academic"), ("1_2_m_youtube_v0_1", "1_2_m_youtube")):
        (root / bucket).mkdir(parents=True)
        for name, text, count in (
            (f"{bucket}_cap_processed.json", CAPTION, 40),
            (f"{short}_mc_v0_1_qa_processed.json", "A.", 90),
            (f"{short}_oe_v0_1_qa_processed.json", "Milk.", 90),
        ):
            rows = [
                {"id": f"{i}", "video": f"v/{i}.mp4", "data_source": bucket, "conversations": talk("What?", text)}
                for i in range(count)
            ]
            (root / bucket / name).write_text(json.dumps(rows))
    return root


def targets(root: Path, cache: Path, **fields: Any) -> list[str]:
    spec = source_config(path=str(root), cache=str(cache), split="all", **{"kind": "llava-video", **fields})
    source: Any = open_source(spec)
    return [source.record(i).target for i in range(len(source))]


def test_llava_video_reads_captions_unless_told_otherwise(llava_video: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert targets(llava_video, cache) == [CAPTION] * 80
    assert targets(llava_video, cache, task="mc") == ["A."] * 180
    assert set(targets(llava_video, cache, task="qa")) == {"A.", "Milk."}
    assert len(targets(llava_video, cache, task="all")) == 440
    file = llava_video / "0_30_s_academic_v0_1" / "0_30_s_academic_mc_v0_1_qa_processed.json"
    assert set(targets(file, cache)) == {"A."}, "a file that is named is read"
    with pytest.raises(ValueError, match=r"no file name holds _cap_ \(task = 'cap'\); there are .*mc_v0_1_qa"):
        targets(llava_video / "*" / "*_qa_processed.json", cache)


def test_a_limit_is_a_seeded_sample_over_all_files(llava_video: Path, tmp_path: Path) -> None:
    def rows(**fields: Any) -> list[str]:
        spec = source_config(
            kind="llava-video", path=str(llava_video), cache=str(tmp_path / "c"), split="all", **fields
        )
        source: Any = open_source(spec)
        return [source.record(i).key for i in range(len(source))]

    some = rows(limit=20)
    assert len(some) == 20
    assert {key.split("/")[0] for key in some} == {"0_30_s_academic_v0_1", "1_2_m_youtube_v0_1"}
    assert some == rows(limit=20)
    assert some != rows(limit=20, seed=1)
    assert set(some) < set(rows(limit=40)), "a larger limit only adds"
    assert rows(limit=500) == rows()


def test_sampled_rows_are_spread_evenly() -> None:
    rows = sample_rows(100_000, 10_000, seed=3)
    assert len(set(rows)) == 10_000
    assert list(rows) == sorted(rows)
    for begin in range(0, 100_000, 10_000):
        assert 850 < sum(begin <= row < begin + 10_000 for row in rows) < 1150
    assert list(sample_rows(5, 0, 0)) == list(sample_rows(5, 9, 0)) == [0, 1, 2, 3, 4]
    assert len(sample_rows(9, 4, 2**31)) == 4


@pytest.fixture
def onevision(tmp_path: Path) -> Path:
    root = tmp_path / "LLaVA-OneVision-Data"
    sink = io.BytesIO()
    Image.new("RGB", (56, 28), (90, 0, 0)).save(sink, "PNG")
    for subset, text in (
        ("CLEVR-Math(MathV360K)", "The answer is 5"),
        ("aokvqa(cauldron,llava_format)", "Red."),
        ("image_textualization(filtered)", CAPTION),
        ("sharegpt4v(coco)", CAPTION),
    ):
        (root / subset).mkdir(parents=True)
        image = {"bytes": sink.getvalue(), "path": None}
        rows = [
            {"id": f"{i}", "image": image, "conversations": talk("Describe.", text), "data_source": subset}
            for i in range(30)
        ]
        parquet.write_table(pa.Table.from_pylist(rows), root / subset / "train-00000-of-00001.parquet")
    return root


def test_onevision_reads_subsets_of_captions(onevision: Path, tmp_path: Path) -> None:
    def words(**fields: Any) -> set[str]:
        spec = source_config(
            kind="onevision-pseudo", path=str(onevision), cache=str(tmp_path / "c"), split="all", **fields
        )
        source = open_source(spec)
        return {line for i in range(len(source)) for line in source[i].target.split("\n")}

    assert words(limit=12) == {CAPTION}
    assert words(subsets=["CLEVR-Math(MathV360K)"]) == {"The answer is 5"}
    assert words(subsets=["all"]) == {CAPTION, "The answer is 5", "Red."}
    with pytest.raises(ValueError, match=r"subsets = \['sharegpt4o'\]; there are \['CLEVR-Math"):
        words(subsets=["sharegpt4o"])
    assert "sharegpt4v(sam)" in CAPTION_SUBSETS
