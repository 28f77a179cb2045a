"""Answers of our own engines instead of an endpoint's: one in this process, or several under Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from score_vllm.client import Reply
from score_vllm.models.offline import EngineOptions, OfflineEngine, VideoRefused
from score_vllm.train.annotate.filters import CaptionFilter
from score_vllm.train.annotate.log import AnnotationLog
from score_vllm.train.annotate.run import Counts, Items, is_done, judged
from score_vllm.train.annotate.teacher import TeacherError
from score_vllm.train.data.records import VideoRecord
from score_vllm.train.data.sample import BrokenSampleError


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How engines are fed.

    Attributes:
        engine: what each of them runs.
        actors: engines under Ray, >= 1; 0: one engine in this process, without Ray.
        batch: videos that one engine is given at once, >= 1.
        partition: videos whose answers come back together from an actor, >= 1: what is lost where one dies.
    """

    engine: EngineOptions
    actors: int = 0
    batch: int = 16
    partition: int = 64

    def __post_init__(self) -> None:
        for name, least in (("actors", 0), ("batch", 1), ("partition", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


def annotate_in_batches(
    items: Items,
    options: BatchOptions,
    judge: CaptionFilter,
    log: AnnotationLog,
    retry_rejected: bool = False,
    quiet: bool = False,
) -> None:
    """Ask about every item that the log does not answer; ``failed`` ones are asked again.

    Args:
        items: what to ask about.
        options: who is asked, and how.
        judge: of the answers.
        log: gets each outcome as it comes.
        retry_rejected: ask again where a filter refused the last answer.
        quiet: no progress bar.

    Raises:
        OSError: the log cannot be written.
        TeacherError: an engine ended.
    """
    with tqdm(total=len(items), desc="annotate", unit="video", disable=quiet) as bar:
        counts = Counts(bar)

        def todo() -> Iterator[tuple[int, VideoRecord]]:
            for index in range(len(items)):
                try:
                    record = items.record(index)
                except BrokenSampleError:  # named when the files are written
                    counts.add("failed")
                    continue
                if is_done(log, record, retry_rejected):
                    bar.update()
                    continue
                try:
                    items.prepare(index)
                except BrokenSampleError as error:
                    log.append(judged(record, error, judge))
                    counts.add("failed")
                    continue
                yield index, record

        for index, answer in (_on_ray if options.actors else _in_process)(todo(), options):
            outcome = judged(items.record(index), answer, judge)
            log.append(outcome)
            counts.add(outcome.status)


def _in_process(
    questions: Iterable[tuple[int, VideoRecord]], options: BatchOptions
) -> Iterator[tuple[int, Reply | VideoRefused]]:
    questions, engine = iter(questions), None
    try:
        while batch := list(islice(questions, options.batch)):
            engine = engine or OfflineEngine(options.engine)
            answers = engine.ask([(record.video, record.prompt) for _, record in batch])
            yield from zip((index for index, _ in batch), answers, strict=True)
    finally:
        if engine is not None:
            engine.close()


class _Actor:
    """An engine of its own in a process of Ray's."""

    def __init__(self, options: EngineOptions) -> None:
        self._engine = OfflineEngine(options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        answers = self._engine.ask([(Path(v), str(p)) for v, p in zip(batch["video"], batch["prompt"], strict=True)])
        replies = [answer if isinstance(answer, Reply) else None for answer in answers]
        return {
            "index": list(batch["index"]),
            "text": [reply and reply.text for reply in replies],
            "finish_reason": [reply and reply.finish_reason for reply in replies],
            "refused": [None if isinstance(answer, Reply) else str(answer) for answer in answers],
        }


def _on_ray(
    questions: Iterable[tuple[int, VideoRecord]], options: BatchOptions
) -> Iterator[tuple[int, Reply | VideoRefused]]:
    import ray
    import ray.data

    rows = [{"index": i, "video": str(record.video.absolute()), "prompt": record.prompt} for i, record in questions]
    if not rows:
        return
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts what became of each video
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    devices = int(options.engine.engine_args.get("tensor_parallel_size", 1))
    answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // options.partition)).map_batches(
        _Actor,
        fn_constructor_kwargs={"options": options.engine},
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=devices if has_gpus else 0,
        num_cpus=1,
    )
    try:
        for row in answered.iter_rows():
            reply = Reply(row["text"], row["finish_reason"], None, None, None)
            yield row["index"], reply if row["refused"] is None else VideoRefused(row["refused"])
    except ray.exceptions.RayError as error:
        raise TeacherError(f"an engine under Ray ended: {' '.join(str(error).split())[-1000:]}") from error
