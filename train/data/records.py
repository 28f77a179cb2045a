"""Video datasets as samples: annotation files are indexed once, records and clips are read when asked for.

One file: the base class, its two readers of records, and the checks that they share.
"""

from __future__ import annotations

import bisect
import json
import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from score_vllm.demo import cache_directory
from score_vllm.train.data.clips import ClipReader
from score_vllm.train.data.config import JsonlConfig, LlavaVideoConfig, VideoConfig
from score_vllm.train.data.record_index import (
    Entry,
    FileReader,
    data_files,
    in_split,
    open_index,
    sample_rows,
    with_progress,
)
from score_vllm.train.data.record_scan import scan_json_array, scan_lines
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.schema import ConfigurationError, MissingError

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "Describe this video in detail."
_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")


@dataclass(frozen=True)
class VideoRecord:
    """A sample before its video is read.

    Attributes:
        key: as :class:`~score_vllm.train.data.sample.TrainingSample`.
        video: file, or folder of frames; it may be missing.
        prompt: the user's text without placeholders.
        target: the response; may be empty where the data brings none, which only an annotator can use.
        start, end: seconds of the video that the record is about; None where it is about all of it.
    """

    key: str
    video: Path
    prompt: str
    target: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class _DataFile:
    path: Path
    name: str
    reader: FileReader
    index: Any


class RecordSource(ABC):
    """Samples of one or several annotation files, in the files' order.

    Args:
        config: the source.

    Raises:
        FileNotFoundError: no data file, or no media folder.
        ValueError: a data file is damaged as a whole, or no record is left.
    """

    suffixes: tuple[str, ...]

    def __init__(self, config: VideoConfig) -> None:
        self.config = config
        self._clips = ClipReader(config.fps, config.max_frames, config.max_pixels)
        if config.media and not Path(config.media).expanduser().is_dir():
            raise MissingError(f"source media {config.media!r} is not a folder")
        paths = self._select(data_files(config.path, self.suffixes))
        cache = Path(config.cache).expanduser() if config.cache else cache_directory() / "index"
        root = Path(config.path).expanduser()
        self._files = []
        for path in paths:
            name = path.relative_to(root).as_posix() if root in path.parents else path.name
            index = open_index(path, self._index_settings(path), lambda path=path: self._entries(path), cache)  # type: ignore[misc]
            self._files.append(_DataFile(path, name, FileReader(path), index))
        self._ends = list(accumulate(len(file.index) for file in self._files))
        self._rows = sample_rows(self._ends[-1], config.limit, config.seed)
        if not len(self):
            raise ConfigurationError(
                f"source path {config.path!r}: no record is left in split {config.split or 'train'!r}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingSample:
        """Sample ``index``.

        Raises:
            BrokenSampleError: its record or its video cannot be used; names both.
            IndexError: ``index`` is outside [0, len).
        """
        record = self.record(index)
        if not record.target.strip():
            raise BrokenSampleError(f"{record.key}: the response is empty")
        clip = self._clips.read(record.video, record.key, record.start, record.end)
        return TrainingSample(record.key, clip.frames, clip.fps, record.prompt, record.target)

    def text(self, index: int) -> tuple[str, str]:
        """See :class:`~score_vllm.train.data.sample.SampleSource`."""
        record = self.record(index)
        return record.prompt, record.target

    def record(self, index: int) -> VideoRecord:
        """Record ``index`` without reading its video.

        Raises:
            BrokenSampleError: the record cannot be used.
            IndexError: ``index`` is outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample index must be in [0, {len(self)}), got {index}")
        row = self._rows[index]
        at = bisect.bisect_right(self._ends, row)
        file = self._files[at]
        offset, length, part = file.index[row - (self._ends[at - 1] if at else 0)]
        where = f"{file.name}@{offset}"
        try:
            return self._parse(file.path, where, file.reader.read(offset, length), part)
        except OSError as error:
            raise BrokenSampleError(f"{where}: {error}") from error

    def _select(self, paths: list[Path]) -> list[Path]:
        """The files to read, of those that ``path`` means."""
        return paths

    def _index_settings(self, path: Path) -> dict[str, Any]:
        """What decides which records the index holds, beside the file."""
        return {"kind": self.config.kind, "split": self.config.split or "train", "held_out": self.config.held_out}

    def _in_split(self, video: str) -> bool:
        return in_split(video, self.config.split, self.config.held_out)

    def _unnamed_in_split(self) -> bool:
        """Where a record without a video goes: broken samples are counted once, with the training split."""
        return self.config.split != "held_out"

    def _media(self, path: Path) -> Path:
        return Path(self.config.media).expanduser() if self.config.media else path.parent

    @abstractmethod
    def _entries(self, path: Path) -> Iterator[Entry]:
        """Entries of one file for the index."""

    @abstractmethod
    def _parse(self, path: Path, where: str, data: bytes, part: int) -> VideoRecord:
        """One record from its bytes; ``where`` names it."""


class LlavaVideoSource(RecordSource):
    """LLaVA-Video-178K: a JSON array (or JSON lines) of ``{id, conversations, data_source, video}``.

    ``video`` is a path below the bucket's folder; frame folders (LLaVA-Hound) are read at 2 frames per second. With
    ``turns="all"`` each pair of question and answer is a sample of its own. Letters of multiple-choice answers stay
    as they are.
    """

    suffixes = (".json", ".jsonl")
    config: LlavaVideoConfig

    def _select(self, paths: list[Path]) -> list[Path]:
        task, chosen = self.config.task, paths
        if task != "all" and not Path(self.config.path).expanduser().is_file():
            marks = ("_oe_", "_mc_", "_qa_") if task == "qa" else (f"_{task}_",)
            chosen = [p for p in paths if any(mark in p.name for mark in marks)]
        if not chosen:
            raise ConfigurationError(
                f"source path {self.config.path!r}: no file name holds {' or '.join(marks)} (task = {task!r}); there "
                f"are {[p.name for p in paths[:5]]}; name another task, 'all', or one file"
            )
        return chosen

    def _index_settings(self, path: Path) -> dict[str, Any]:
        return {**super()._index_settings(path), "turns": self.config.turns}

    def _entries(self, path: Path) -> Iterator[Entry]:
        records = scan_json_array(path) if path.suffix == ".json" else _scan_json_lines(path)
        for offset, length, record in with_progress(path, records):
            video = record.get("video") if isinstance(record, dict) else None
            if not (self._in_split(video) if isinstance(video, str) else self._unnamed_in_split()):
                continue
            parts = 1
            if self.config.turns == "all" and isinstance(record, dict):
                parts = max(1, len(pairs_of(record.get("conversations"))))
            for part in range(parts):
                yield offset, length, part

    def _parse(self, path: Path, where: str, data: bytes, part: int) -> VideoRecord:
        record = parse_object(data, where)
        video = relative_media(record.get("video"), where)
        key = f"{where}:{video}" + (f"#{part}" if self.config.turns == "all" else "")
        pairs = pairs_of(record.get("conversations"))
        if not pairs:
            raise BrokenSampleError(f"{key}: no turn of a human with an answer by gpt after it")
        prompt, target = pairs[part]
        if not prompt:
            raise BrokenSampleError(f"{key}: the human's turn is empty")
        return VideoRecord(key, self._find(path, video, record.get("data_source")), prompt, target)

    def _find(self, path: Path, video: PurePosixPath, bucket: Any) -> Path:
        media = self._media(path)
        folders = [media]
        if isinstance(bucket, str) and re.fullmatch(r"[\w.-]+", bucket) and bucket not in (".", ".."):
            folders.append(media / bucket)
        # A folder of frames may stand where the record names a file.
        tries = [f / name for f in folders for name in (video, video.with_suffix(""))]
        return next((p for p in tries if p.exists()), tries[0])


class JsonlSource(RecordSource):
    """JSON lines ``{"video": path, "prompt": text, "caption" or "target": text}``; other keys are passed over.

    ``start`` and ``end``, in seconds, bound the part of the video that a record is about. A path may be absolute, or
    start from ``media`` (else the file's folder). Without ``prompt`` the source's own is asked. This is what
    ``python -m score_vllm.train.annotate`` writes.
    """

    suffixes = (".jsonl",)
    config: JsonlConfig

    def _entries(self, path: Path) -> Iterator[Entry]:
        for offset, length, record in with_progress(path, _scan_json_lines(path)):
            video = record.get("video") if isinstance(record, dict) else None
            if self._in_split(video) if isinstance(video, str) else self._unnamed_in_split():
                yield offset, length, 0

    def _parse(self, path: Path, where: str, data: bytes, part: int) -> VideoRecord:
        record = parse_object(data, where)
        video = record.get("video")
        if isinstance(video, str) and video.startswith("/") and "\0" not in video:
            place = Path(video)
        else:
            place = self._media(path) / relative_media(video, where)
        key = f"{where}:{video}"
        texts = {name: record[name] for name in ("prompt", "caption", "target") if record.get(name) is not None}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise BrokenSampleError(f"{key}: {name} must be a string, got {type(text).__name__}")
        if "caption" in texts and "target" in texts and texts["caption"] != texts["target"]:
            raise BrokenSampleError(f"{key}: both caption and target are there, and differ")
        target = texts.get("target", texts.get("caption", ""))
        prompt = _PLACEHOLDER.sub("\n", texts.get("prompt", "")).strip()
        window = [_seconds(record, name, key) for name in ("start", "end")]
        return VideoRecord(key, place, prompt or self.config.prompt or DEFAULT_PROMPT, target.strip(), *window)


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenSampleError: it is none.
    """
    try:
        record = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise BrokenSampleError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BrokenSampleError(f"{where}: must be a JSON object, got {type(record).__name__}")
    return record


def relative_media(value: Any, where: str) -> PurePosixPath:
    """A path inside the media folder.

    Raises:
        BrokenSampleError: not a path, or one that leads out of the folder.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BrokenSampleError(f"{where}: video must be a path, got {value!r}")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise BrokenSampleError(f"{where}: video {value!r} leads out of the media folder")
    return path


def pairs_of(conversations: Any) -> list[tuple[str, str]]:
    """Human turns, placeholders removed, with the gpt turn that follows each; other turns are passed over.

    Returns:
        ``(prompt, target)`` pairs; empty where there is none.
    """
    pairs = []
    question: str | None = None
    for turn in conversations if isinstance(conversations, list) else []:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker == "human":
            question = _PLACEHOLDER.sub("\n", text).strip() if isinstance(text, str) else None
        elif speaker == "gpt" and question is not None and isinstance(text, str):
            pairs.append((question, text.strip()))
            question = None
    return pairs


def _seconds(record: dict[str, Any], name: str, key: str) -> float | None:
    value = record.get(name)
    if value is not None and not (type(value) in (int, float) and 0 <= value < float("inf")):
        raise BrokenSampleError(f"{key}: {name} must be seconds >= 0, got {value!r}")
    return value


def log_dropped(path: Path, dropped: Counter[str]) -> None:
    """Say how many records of a file an index leaves out, and why."""
    if dropped:
        log.info("%s: left out %s", path.name, ", ".join(f"{n} ({why})" for why, n in sorted(dropped.items())))


def _scan_json_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    for offset, length, line in scan_lines(path):
        try:
            yield offset, length, json.loads(line)
        except (ValueError, RecursionError):
            yield offset, length, None
