"""Re-captioning a dataset: every record to the teacher once, every outcome to the log, the kept ones to a file."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from score_vllm.client import Reply
from score_vllm.files import write_atomically
from score_vllm.train.annotate.filters import CaptionFilter, clean
from score_vllm.train.annotate.log import AnnotationLog, Outcome, write_lines
from score_vllm.train.annotate.teacher import AnswerError, NoAnswerError, Teacher, TeacherError
from score_vllm.train.data.clips import encode_mp4
from score_vllm.train.data.config import JsonlConfig
from score_vllm.train.data.records import DEFAULT_PROMPT, JsonlSource, RecordSource, VideoRecord
from score_vllm.train.data.sample import BrokenSampleError, SampleSource

# As many videos in a row without any answer mean that the endpoint is gone.
_LEAST_IN_A_ROW = 10


class Items(Protocol):
    """Videos to annotate, by index."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> VideoRecord:
        """What is asked about what; cheap, and the same in every run. Raises BrokenSampleError."""

    def prepare(self, index: int) -> None:
        """Make the video's file where it does not exist. Raises BrokenSampleError."""


class FileItems:
    """Records whose videos are files.

    Args:
        source: the dataset.
        prompt: asked about each; empty: each record's own.
    """

    def __init__(self, source: RecordSource, prompt: str) -> None:
        self._source = source
        self._prompt = prompt

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> VideoRecord:
        record = self._source.record(index)
        return VideoRecord(record.key, record.video, self._prompt or record.prompt, record.target)

    def prepare(self, index: int) -> None:
        pass


class MadeItems:
    """Samples that are no files: each is written as an mp4 first, which the annotations then name.

    Args:
        source: the samples.
        prompt: asked about each.
        folder: of the files.
    """

    def __init__(self, source: SampleSource, prompt: str, folder: Path) -> None:
        self._source = source
        self._prompt = prompt or DEFAULT_PROMPT
        self._folder = folder

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> VideoRecord:
        name = f"{index:08d}"
        return VideoRecord(name, self._folder / f"{name}.mp4", self._prompt, "")

    def prepare(self, index: int) -> None:
        path = self.record(index).video
        if path.exists():
            return
        sample = self._source[index]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda part: part.write_bytes(encode_mp4(sample.frames, sample.fps)))


@dataclass(frozen=True)
class Summary:
    """How a run ended: videos kept; rejected, by filter; failed, by no answer or a broken record."""

    kept: int
    rejected: Counter[str]
    failed: int


def is_done(log: AnnotationLog, record: VideoRecord, retry_rejected: bool) -> bool:
    """Whether a record needs no asking: answered, for the same video and question."""
    if log.status(record.key) not in (("ok",) if retry_rejected else ("ok", "rejected")):
        return False
    outcome = log.outcome(record.key)
    return (outcome.video, outcome.prompt) == (_absolute(record.video), record.prompt)


async def annotate(
    items: Items,
    teacher: Teacher,
    judge: CaptionFilter,
    log: AnnotationLog,
    concurrency: int,
    retry_rejected: bool = False,
    quiet: bool = False,
) -> None:
    """Ask about every item that the log does not answer; ``failed`` ones are asked again.

    Args:
        items: what to ask about.
        teacher: who is asked.
        judge: of the answers.
        log: gets each outcome as it comes.
        concurrency: questions on the way at once, >= 1.
        retry_rejected: ask again where a filter refused the last answer.
        quiet: no progress bar.

    Raises:
        OSError: the log cannot be written.
        TeacherError: the endpoint refuses everything, or too many videos in a row got no answer.
    """
    silent = 0

    async def work(todo: Iterator[int], bar: Any, counts: Counts) -> None:
        nonlocal silent
        for index in todo:
            try:
                record = items.record(index)
            except BrokenSampleError:  # named when the files are written
                outcome = None
            else:
                if is_done(log, record, retry_rejected):
                    bar.update()
                    continue
                outcome, error = await _one(items, index, record, teacher, judge)
                log.append(outcome)
                silent = silent + 1 if isinstance(error, NoAnswerError) else 0
                if silent >= max(_LEAST_IN_A_ROW, 2 * concurrency):
                    raise TeacherError(f"{silent} videos in a row got no answer; the last: {outcome.reason}")
            counts.add(outcome.status if outcome else "failed")

    todo = iter(range(len(items)))
    with tqdm(total=len(items), desc="annotate", unit="video", disable=quiet) as bar:
        counts = Counts(bar)
        tasks = [asyncio.create_task(work(todo, bar, counts)) for _ in range(min(concurrency, max(1, len(items))))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Counts:
    """What became of the videos, shown behind the bar."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._counts = bar, Counter[str]()

    def add(self, status: str) -> None:
        """One more."""
        self._counts[status] += 1
        self._bar.set_postfix(self._counts, refresh=False)
        self._bar.update()


async def _one(
    items: Items, index: int, record: VideoRecord, teacher: Teacher, judge: CaptionFilter
) -> tuple[Outcome, Exception | None]:
    try:
        await asyncio.to_thread(items.prepare, index)
        answer = await teacher.ask(Path(_absolute(record.video)), record.prompt)
    except (AnswerError, BrokenSampleError) as error:
        return judged(record, error, judge), error
    return judged(record, answer, judge), None


def judged(record: VideoRecord, answer: Reply | Exception, judge: CaptionFilter) -> Outcome:
    """The outcome of one question: an answer, which the filters may refuse, or why there is none."""
    video = _absolute(record.video)
    if isinstance(answer, Exception):
        return Outcome(record.key, "failed", video, record.prompt, reason=str(answer))
    text = clean(answer.text or "")
    reason = judge.reason(text, record.prompt, answer.finish_reason)
    shown = text if isinstance(text, str) else repr(text)[:1000]
    return Outcome(record.key, "rejected" if reason else "ok", video, record.prompt, shown, reason)


def write_results(items: Items, log: AnnotationLog, output: Path, failures: Path, teacher: str) -> Summary:
    """Write the kept annotations for the ``jsonl`` source, in the dataset's order, and the others with their reasons.

    Args:
        items, log: of a finished run.
        output: JSON lines ``{video, prompt, caption, key, teacher}``; not written where nothing is kept.
        failures: JSON lines ``{key, status, reason, video, text}``; removed where there is none.
        teacher: the model's name.

    Returns:
        The counts.

    Raises:
        OSError: a file cannot be written.
        RuntimeError: the written file does not read back as it should.
    """
    rejected = Counter[str]()
    kept = failed = 0

    def outcomes() -> Iterator[Outcome]:
        for index in range(len(items)):
            try:
                record = items.record(index)
            except BrokenSampleError as error:
                yield Outcome(f"record {index}", "failed", "", "", reason=str(error))
                continue
            if log.status(record.key):
                yield log.outcome(record.key)
            else:
                yield Outcome(record.key, "failed", str(record.video), record.prompt, reason="not asked")

    for outcome in outcomes():
        kept += outcome.status == "ok"
        failed += outcome.status == "failed"
        if outcome.status == "rejected":
            rejected[outcome.reason] += 1

    good = (
        {"video": o.video, "prompt": o.prompt, "caption": o.text, "key": o.key, "teacher": teacher}
        for o in outcomes()
        if o.status == "ok"
    )
    if kept:
        write_lines(output, good, check=lambda path: _check(path, kept))
    if failed or rejected:
        names = ("key", "status", "reason", "video", "text")
        write_lines(failures, ({n: asdict(o)[n] for n in names} for o in outcomes() if o.status != "ok"))
    else:
        failures.unlink(missing_ok=True)
    return Summary(kept, rejected, failed)


def _check(path: Path, count: int) -> None:
    """The file must be what the ``jsonl`` source reads."""
    with tempfile.TemporaryDirectory(prefix="score-annotate-") as cache:
        source = JsonlSource(JsonlConfig(kind="jsonl", path=str(path), split="all", cache=cache))
        if len(source) != count:
            raise RuntimeError(f"{path}: {count} annotations were written, {len(source)} read back")
        for index in range(count):
            if not source.record(index).target:
                raise RuntimeError(f"{path}: annotation {index} reads back without a caption")


def _absolute(path: Path) -> str:
    return str(path.absolute())
