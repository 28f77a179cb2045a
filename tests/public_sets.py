"""Three-question sets in the published formats, about any three clips; used by several tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPTIONS = ("Apples", "Candles", "Berries", "All are of the same number")


def videomme_rows(stems: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "video_id": f"{i:03d}",
            "duration": duration,
            "domain": "Knowledge",
            "sub_category": "Humanity & History",
            "url": f"https://www.youtube.com/watch?v={stem}",
            "videoID": stem,
            "question_id": f"{i:03d}-1",
            "task_type": "Counting Problem",
            "question": "How many things move in the video?",
            "options": [f"{letter}. {text}." for letter, text in zip("ABCD", OPTIONS, strict=True)],
            "answer": "ABC"[i - 1],
        }
        for i, (stem, duration) in enumerate(zip(stems, ("short", "medium", "long"), strict=True), start=1)
    ]


def write_videomme(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A parquet file, as published."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def mlvu_row(video: str, question_type: str, answer: str = "Yellow") -> dict[str, Any]:
    return {
        "video": video,
        "duration": 246,
        "question": "What color is the square?",
        "candidates": ["Yellow", "Red", "Green", "Blue"],
        "answer": answer,
        "question_type": question_type,
    }


def write_mlvu(folder: Path, videos: Sequence[str]) -> Path:
    """One file per task, as published, and a generative one beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = (("1_plotQA", "plotQA"), ("2_needle", "findNeedle"), ("4_count", "count"))
    for (stem, task), video in zip(files, videos, strict=True):
        (folder / f"{stem}.json").write_text(json.dumps([mlvu_row(video, task)]))
    generative = {
        "video": videos[0],
        "duration": 9,
        "question": "Summarize.",
        "answer": "A.",
        "question_type": "summary",
    }
    (folder / "9_summary.json").write_text(json.dumps([generative]))
    return folder


def lvbench_line(key: str, uid: str, types: list[str], answer: str = "D") -> dict[str, Any]:
    entry = {
        "uid": uid,
        "question": "What year appears in the opening caption of the video?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
        "answer": answer,
        "question_type": types,
        "time_reference": "00:15-00:19",
    }
    info = {"duration_minutes": 65, "fps": 25.0, "resolution": {"width": 1280, "height": 720}}
    return {"key": key, "type": "cartoon", "video_info": info, "qa": [entry]}


def write_lvbench(path: Path, keys: Sequence[str]) -> Path:
    types = (["key information retrieval"], ["reasoning", "event understanding"], ["reasoning"])
    lines = [lvbench_line(key, str(i), kinds) for i, (key, kinds) in enumerate(zip(keys, types, strict=True))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
