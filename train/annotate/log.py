"""The annotator's memory: an append-only file of outcomes that survives a kill at any byte."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from score_vllm.files import write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATUSES = ("ok", "rejected", "failed")


class LogError(Exception):
    """The file belongs to another run, or to a running one."""


@dataclass(frozen=True)
class Outcome:
    """What became of one video.

    Attributes:
        key: of the record.
        status: ``ok``, ``rejected`` (an answer that a filter refuses) or ``failed`` (no answer).
        video: path of the file.
        prompt: what was asked.
        text: the answer; for ``failed`` empty.
        reason: a filter's name, or the error; for ``ok`` empty.
    """

    key: str
    status: str
    video: str
    prompt: str
    text: str = ""
    reason: str = ""


class AnnotationLog:
    """Outcomes in a JSON-lines file whose first line holds the run's settings.

    Each line is on the disk before :meth:`append` returns. A last line that a kill cut short is removed on opening.
    One process at a time holds the file. In memory: keys, and where their lines begin.

    Args:
        path: the file; made where it does not exist.
        settings: JSON-able; a file of other settings is refused.

    Raises:
        LogError: another process has it, or it was made with other settings; the message names them.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held open, closed by close()
        try:
            self._open(settings)
        except BaseException:
            self._file.close()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LogError(f"{self.path} is in use by another annotator") from error
        self._places: dict[str, tuple[int, int]] = {}
        self._statuses: dict[str, str] = {}
        self._repair()
        header = {"format": FORMAT_VERSION, "settings": settings}
        self._file.seek(0)
        end = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines):
                if number == 0:
                    self._check_header(line, header)
                else:
                    self._remember(line, end)
                end += len(line)
        self._end = end
        if not end:
            self._write(json.dumps(header, sort_keys=True).encode() + b"\n")
            _sync_folder(self.path.parent)

    def _repair(self) -> None:
        """Cut off what follows the last line end."""
        size = os.fstat(self._file.fileno()).st_size
        keep, step = size, 1 << 16
        while keep:
            begin = max(0, keep - step)
            self._file.seek(begin)
            at = self._file.read(keep - begin).rfind(b"\n")
            if at >= 0:
                keep = begin + at + 1
                break
            keep = begin
        if keep < size:
            log.warning("%s: %d bytes of a line that was cut short are removed", self.path, size - keep)
            self._file.truncate(keep)
            os.fsync(self._file.fileno())

    def _check_header(self, line: bytes, header: dict[str, Any]) -> None:
        try:
            found = json.loads(line)
            theirs: dict[str, Any] = dict(found["settings"])
            version = found["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise LogError(f"{self.path} is not an annotator's file; choose another output") from error
        if version != FORMAT_VERSION:
            raise LogError(f"{self.path} has format {version!r}, this version writes {FORMAT_VERSION}")
        ours = json.loads(json.dumps(header["settings"]))
        differ = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        if differ:
            raise LogError(
                f"{self.path} was begun with other settings: "
                + "; ".join(f"{k} was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in differ)
                + ". Choose another output, or delete it to begin anew"
            )

    def _remember(self, line: bytes, begin: int) -> None:
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            # Not a kill's work, which ends the file; the video is simply asked again.
            log.warning("%s: the line at byte %d is damaged and not used", self.path, begin)
            return
        self._places[outcome.key] = (begin, len(line))
        self._statuses[outcome.key] = outcome.status

    def status(self, key: str) -> str:
        """Last status of a key; '' where there is none."""
        return self._statuses.get(key, "")

    def append(self, outcome: Outcome) -> None:
        """Write one outcome; it replaces an earlier one of the same key."""
        if outcome.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {outcome.status!r}")
        line = json.dumps(asdict(outcome)).encode() + b"\n"
        begin = self._end
        self._write(line)
        self._places[outcome.key] = (begin, len(line))
        self._statuses[outcome.key] = outcome.status

    def outcome(self, key: str) -> Outcome:
        """The last outcome of a key.

        Raises:
            KeyError: there is none.
        """
        begin, length = self._places[key]
        return Outcome(**json.loads(os.pread(self._file.fileno(), length, begin)))

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        # One call, at the end whatever was read meanwhile.
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(self._end)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        os.fsync(self._file.fileno())
        self._end += len(line)


def write_lines(path: Path, rows: Iterable[dict[str, Any]], check: Callable[[Path], None] | None = None) -> int:
    """Write JSON lines at once: aside, onto the disk, checked, then renamed.

    Args:
        path: the file; an earlier one is replaced.
        rows: JSON-able objects.
        check: gets the written file before it is renamed, and raises where it is not what it should be.

    Returns:
        The number of lines.
    """
    count = 0

    def write(part: Path) -> None:
        nonlocal count
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(part)

    write_atomically(path, write)
    _sync_folder(path.parent)
    return count


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
