"""Koala-36M: captions in csv files of gigabytes, clips cut by the user as ``<videoID>.<extension>``."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from score_vllm.train.data.clips import VIDEO_SUFFIXES
from score_vllm.train.data.config import KoalaConfig
from score_vllm.train.data.record_index import Entry, with_progress
from score_vllm.train.data.record_scan import parse_csv_row, scan_csv
from score_vllm.train.data.records import DEFAULT_PROMPT, RecordSource, VideoRecord, log_dropped
from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.train.schema import ConfigurationError

SCORES = {
    "min_clarity": "clarity_score",
    "min_aesthetic": "aesthetic_score",
    "min_training_suitability": "video_training_suitability_score",
}
_NEEDED = ("videoID", "timestamp", "caption")
_TIME = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


class KoalaSource(RecordSource):
    """Rows ``videoID,url,timestamp,caption,*_score`` with their clips; filters apply when the index is built.

    A clip is the file ``<videoID>.mp4`` (or another suffix) in the media folder, else its time span of the whole video
    ``<youtube id>.mp4``. Clips of one YouTube video (``<youtube id>_<clip index>``) are all in the same split.
    """

    suffixes = (".csv",)
    config: KoalaConfig

    def __init__(self, config: KoalaConfig) -> None:
        self._columns: dict[Path, list[str]] = {}
        self._present: frozenset[str] | None = None
        if config.present_only and Path(config.media).expanduser().is_dir():
            with os.scandir(Path(config.media).expanduser()) as found:
                names = (os.path.splitext(entry.name) for entry in found)
                self._present = frozenset(stem for stem, suffix in names if suffix in VIDEO_SUFFIXES)
        super().__init__(config)
        self._present = None  # the index knows

    def _index_settings(self, path: Path) -> dict[str, Any]:
        self._columns[path] = self._header(path)
        filters = {name: getattr(self.config, name) for name in (*SCORES, "min_seconds", "max_seconds")}
        present = self._present
        listing = None if present is None else hashlib.sha256("\n".join(sorted(present)).encode()).hexdigest()
        return {**super()._index_settings(path), **filters, "present": listing}

    def _header(self, path: Path) -> list[str]:
        columns = next((row for _, _, row in scan_csv(path)), None) or []
        needed = [*_NEEDED, *(column for name, column in SCORES.items() if getattr(self.config, name))]
        if missing := [name for name in needed if name not in columns]:
            raise ConfigurationError(f"{path} lacks the columns {missing}; its header is {columns[:12]}")
        return columns

    def _entries(self, path: Path) -> Iterator[Entry]:
        columns, dropped = self._columns[path], Counter[str]()
        rows = scan_csv(path)
        next(rows, None)
        for offset, length, row in with_progress(path, rows):
            fields = dict(zip(columns, row, strict=True)) if row and len(row) == len(columns) else None
            if fields is None:
                if self._unnamed_in_split():
                    yield offset, length, 0
                continue
            if not self._in_split(_youtube_id(fields["videoID"])):
                continue
            if reason := self._refused(fields):
                dropped[reason] += 1
                continue
            yield offset, length, 0
        log_dropped(path, dropped)

    def _refused(self, fields: dict[str, str]) -> str:
        names = {fields["videoID"], _youtube_id(fields["videoID"])}
        if self._present is not None and not names & self._present:
            return "present_only"
        for name, column in SCORES.items():
            least = getattr(self.config, name)
            if least and not _number(fields[column]) >= least:
                return name
        if self.config.min_seconds or self.config.max_seconds:
            try:
                start, end = parse_timestamps(fields["timestamp"])
            except ValueError:
                return "timestamp"
            if end - start < self.config.min_seconds:
                return "min_seconds"
            if self.config.max_seconds and end - start > self.config.max_seconds:
                return "max_seconds"
        return ""

    def _parse(self, path: Path, where: str, data: bytes, part: int) -> VideoRecord:
        columns = self._columns[path]
        try:
            row = parse_csv_row(data)
        except ValueError as error:
            raise BrokenSampleError(f"{where}: {error}") from error
        if len(row) != len(columns):
            raise BrokenSampleError(f"{where}: a row of {len(row)} fields under a header of {len(columns)}")
        fields = dict(zip(columns, row, strict=True))
        video = fields["videoID"]
        if not re.fullmatch(r"[\w-]+", video):
            raise BrokenSampleError(f"{where}: videoID must be letters, digits, '_' and '-', got {video[:80]!r}")
        key = f"{where}:{video}"
        try:
            span = parse_timestamps(fields["timestamp"])
        except ValueError as error:
            raise BrokenSampleError(f"{key}: {error}") from error
        names = (video, _youtube_id(video))
        tries = [(self._media(path) / f"{name}{suffix}", name) for name in names for suffix in VIDEO_SUFFIXES]
        file, name = next(((p, n) for p, n in tries if p.exists()), tries[0])
        window = span if name != video else (None, None)
        return VideoRecord(key, file, self.config.prompt or DEFAULT_PROMPT, fields["caption"].strip(), *window)


def _youtube_id(video: str) -> str:
    """``<youtube id>_<clip index>`` without its index; the id itself may hold underscores."""
    return video.rpartition("_")[0] or video


def parse_timestamps(text: str) -> tuple[float, float]:
    """Start and end of a clip in its source video, from ``['H:MM:SS.fff', 'H:MM:SS.fff']``; the fraction may lack.

    Returns:
        ``(start, end)`` in seconds, start < end.

    Raises:
        ValueError: not two times in order.
    """
    times = [int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in _TIME.findall(text)]
    if len(times) != 2 or times[0] >= times[1]:
        raise ValueError(f"timestamp must hold two times H:MM:SS in order, got {text[:80]!r}")
    return times[0], times[1]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
