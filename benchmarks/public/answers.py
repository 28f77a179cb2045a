"""The file of answers: one line per finished request, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

VERSION = 1


class AnswersError(ValueError):
    """The file of answers cannot be used for this run; the message says why."""


def ratio_name(ratio: float | None) -> str:
    """A ratio as the files and tables show it; "default" is the server's own."""
    return "default" if ratio is None else repr(float(ratio))


class Answers:
    """An append-only JSON-lines file: a first line with the run's configuration, then one record per request.

    A record holds ``ratio``, ``id``, ``status`` ("answered" or "failed") and what came back. The last record of a
    question wins, so failures are asked again when the run goes on. Another process cannot write the same file.

    Args:
        path: made where absent.
        configuration: everything that must be the same for records to be comparable.

    Raises:
        AnswersError: another run's file, a damaged line (other than a torn last one), or in use.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AnswersError(f"{path} is in use by another run; give this one its own --answers") from None
        try:
            self._load({"version": VERSION, **json.loads(json.dumps(configuration))})
            self._file = path.open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    def _load(self, configuration: dict[str, Any]) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            if content and not content.startswith(b'{"configuration"'):
                raise AnswersError(f"{self.path} is not a file of answers; it stays as it is, choose another --answers")
            with self.path.open("w", encoding="utf-8") as file:
                file.write(json.dumps({"configuration": configuration}) + "\n")
            return
        if len(whole) < len(content):
            # The process was killed inside its last write; that request is asked again.
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._compare(record["configuration"], configuration)
                else:
                    self.records[record["ratio"], record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, AnswersError):
                    raise
                raise AnswersError(f"{self.path}: line {number} is not a record of this benchmark: {error!r}") from None

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        names = sorted(set(theirs) | set(ours))
        other = [f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} asked" for n in names if theirs.get(n) != ours.get(n)]
        if other:
            raise AnswersError(
                f"{self.path} holds answers of another configuration ({'; '.join(other)}); "
                "give this run its own --answers, or remove that file"
            )

    def answered(self, ratio: str, question: str) -> bool:
        """Whether this request has an answer that need not be asked for again."""
        return self.records.get((ratio, question), {}).get("status") == "answered"

    def add(self, record: dict[str, Any]) -> None:
        """Keep one finished request; it is in the file when this returns."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.records[record["ratio"], record["id"]] = record

    def close(self) -> None:
        """Let another run use the file."""
        self._file.close()
        self._lock.release()
