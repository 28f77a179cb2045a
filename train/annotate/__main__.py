"""``python -m score_vllm.train.annotate``: re-caption a dataset with a teacher: an endpoint, or engines of our own.

The paper re-annotates all training samples with Qwen3-VL-235B-A22B and Qwen2.5-VL-72B (section 5.1).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from score_vllm.train.annotate.filters import REASONS, CaptionFilter
from score_vllm.train.data.config import KINDS, FileConfig, SourceConfig, source_config
from score_vllm.train.schema import parse_override

if TYPE_CHECKING:
    from score_vllm.train.annotate.batch import BatchOptions
    from score_vllm.train.annotate.log import AnnotationLog
    from score_vllm.train.annotate.run import Items
    from score_vllm.train.annotate.teacher import TeacherConfig

BACKENDS = ("http", "engine", "ray")
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    reasons = "; ".join(f"{name}: {text}" for name, text in REASONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m score_vllm.train.annotate",
        description="Ask a teacher model about every video of a dataset and write the good answers as JSON lines, "
        "which a source of kind 'jsonl' reads. Run the same command again to go on where it ended: what was answered "
        "is not asked again, what failed is.",
        epilog=f"Answers are refused for these reasons: {reasons}. Exit code: 0 all asked, 1 some videos failed (see "
        "the failures file), 2 wrong usage, 3 the endpoint or an engine gave up, 130 interrupted.",
    )
    data = parser.add_argument_group("dataset")
    data.add_argument("--kind", required=True, choices=sorted(KINDS), help="format of the dataset")
    data.add_argument("--data", default="", metavar="PATH", help="its file, folder or pattern")
    data.add_argument("--media", default="", metavar="DIR", help="folder that the videos' paths start from")
    data.add_argument("--split", default="", help="train, held_out or all (default: all; world kinds: their own)")
    data.add_argument("--limit", type=int, default=0, metavar="N", help="only N records, a seeded sample")
    data.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="another field of the source, repeatable"
    )
    data.add_argument("--clips", type=Path, metavar="DIR", help="where kinds without video files write theirs as mp4")
    data.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the annotations, .jsonl")
    asked = parser.add_argument_group("teacher")
    asked.add_argument(
        "--backend",
        default="http",
        choices=BACKENDS,
        help="an endpoint, a vLLM engine in this process, or several under Ray (default: %(default)s)",
    )
    asked.add_argument("--base-url", metavar="URL", help="of the endpoint, up to and including /v1")
    asked.add_argument("--model", required=True, help="the teacher's name there; of an engine, as for score-serve")
    asked.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key"
    )
    asked.add_argument("--prompt", default="", help="asked about every video; default: each record's own question")
    asked.add_argument(
        "--send", default="base64", choices=("base64", "file"), help="the video itself, or a file:// URL"
    )
    asked.add_argument(
        "--retention-ratio",
        type=float,
        metavar="RATIO",
        help="in (0, 1]; for score-vllm's own server, whose default it leaves, and engines (default: 0.1)",
    )
    asked.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    asked.add_argument("--temperature", type=float, default=0.0)
    asked.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of one try")
    asked.add_argument("--retries", type=int, default=5, help="after the first try")
    asked.add_argument("--backoff", type=float, default=1.0, metavar="S", help="before the first retry; doubles")
    asked.add_argument("--concurrency", type=int, default=8, metavar="N", help="questions on the way at once")
    engine = parser.add_argument_group("engines (--backend engine, --backend ray)")
    engine.add_argument("--policy", metavar="DIR", help="retention policy; as for score-serve")
    engine.add_argument("--method", metavar="NAME", help="selection method; as for score-serve")
    engine.add_argument("--engine-args", default="{}", metavar="JSON", help="more arguments of vLLM's engine")
    engine.add_argument("--batch", type=int, default=16, metavar="N", help="videos that an engine is given at once")
    engine.add_argument("--actors", type=int, default=1, metavar="N", help="engines under Ray")
    engine.add_argument(
        "--partition", type=int, default=64, metavar="N", help="videos under Ray that are lost where an engine dies"
    )
    kept = parser.add_argument_group("filters")
    kept.add_argument("--min-words", type=int, default=CaptionFilter.min_words)
    kept.add_argument("--max-words", type=int, default=CaptionFilter.max_words)
    kept.add_argument("--max-repeated", type=float, default=CaptionFilter.max_repeated, metavar="PART")
    kept.add_argument("--min-letters", type=float, default=CaptionFilter.min_letters, metavar="PART")
    kept.add_argument("--allow", default="", metavar="REASONS", help="reasons to let pass, with commas between")
    kept.add_argument("--retry-rejected", action="store_true", help="ask again where a filter refused the answer")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _source(args: argparse.Namespace) -> SourceConfig:
    """The dataset's description from the options.

    Raises:
        ValueError: an unknown key, or a value out of range.
    """
    raw: dict[str, Any] = {"limit": args.limit, "split": args.split}
    raw |= {name: value for name, value in (("path", args.data), ("media", args.media)) if value}
    if issubclass(KINDS[args.kind], FileConfig) and not args.split:
        raw["split"] = "all"
    for option in args.option:
        (key, *deeper), value = parse_override(option, "--option")
        raw[".".join([key, *deeper])] = value
    try:
        return source_config("dataset", kind=args.kind, **raw)
    except ValueError as error:
        # By the names of the options, where there is one.
        options = {"path": "--data"} | {name: f"--{name}" for name in ("media", "split", "limit", "kind")}
        told = re.sub(r"^dataset\.(\w+)", lambda m: options.get(m[1], f"--option {m[1]}"), str(error))
        raise ValueError(told) from error


def open_teacher(args: argparse.Namespace) -> TeacherConfig | BatchOptions:
    """Who is asked: an endpoint, or engines of our own.

    Raises:
        ValueError: an option is missing, out of range, or of another backend.
    """
    if args.backend == "http":
        from score_vllm.train.annotate.teacher import TeacherConfig

        if not args.base_url:
            raise ValueError("--backend http needs --base-url URL")
        if args.policy or args.method:
            raise ValueError("--policy and --method belong to --backend engine and ray: an endpoint has its own")
        return TeacherConfig(
            base_url=args.base_url,
            model=args.model,
            api_key=os.environ.get(args.api_key_env, ""),
            send=args.send,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            retention_ratio=args.retention_ratio,
            timeout=args.timeout,
            retries=args.retries,
            backoff=args.backoff,
        )
    from score_vllm.models.offline import EngineOptions
    from score_vllm.train.annotate.batch import BatchOptions

    if args.base_url:
        raise ValueError(f"--base-url belongs to --backend http, got --backend {args.backend}")
    if args.backend == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--backend ray needs: pip install 'score-vllm[ray]'")
    try:
        engine_args = json.loads(args.engine_args)
    except ValueError:
        engine_args = None
    if not isinstance(engine_args, dict):
        raise ValueError(f"--engine-args must be a JSON object, got {args.engine_args!r}")
    engine = EngineOptions(
        model=args.model,
        policy=args.policy,
        method=args.method,
        retention_ratio=0.1 if args.retention_ratio is None else args.retention_ratio,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        engine_args=engine_args,
    )
    engine.resolve()
    if args.backend == "ray" and args.actors < 1:
        raise ValueError(f"--actors must be >= 1, got {args.actors}")
    actors = args.actors if args.backend == "ray" else 0
    return BatchOptions(engine=engine, actors=actors, batch=args.batch, partition=args.partition)


def open_all(args: argparse.Namespace) -> tuple[Items, CaptionFilter, TeacherConfig | BatchOptions, AnnotationLog]:
    """Data, filters, teacher and log from the options.

    Raises:
        LogError, OSError, ValueError: wrong usage; the message is a sentence.
    """
    from score_vllm.train.annotate.log import AnnotationLog
    from score_vllm.train.annotate.run import FileItems, MadeItems
    from score_vllm.train.data.records import RecordSource
    from score_vllm.train.data.sources import open_source

    if args.output.suffix != ".jsonl":
        raise ValueError(f"--output must end in .jsonl, got {str(args.output)!r}")
    if args.concurrency < 1:
        raise ValueError(f"--concurrency must be >= 1, got {args.concurrency}")
    config = _source(args)
    allow = tuple(name.strip() for name in args.allow.split(",") if name.strip())
    judge = CaptionFilter(
        args.min_words,
        args.max_words,
        max_repeated=args.max_repeated,
        min_letters=args.min_letters,
        allow=allow,
    )
    teacher = open_teacher(args)
    source = open_source(config)
    items: Items
    if isinstance(source, RecordSource):
        items = FileItems(source, args.prompt)
    elif args.clips is None:
        raise ValueError(f"--kind {args.kind} has no video files; name a folder for them with --clips DIR")
    else:
        items = MadeItems(source, args.prompt, args.clips)
    described = config.model_dump(mode="json")
    # What decides an answer, and nothing else: the endpoint may move, and the limit may grow.
    for name in ("limit", "weight", "cache"):
        described.pop(name, None)  # made clips have no cache
    settings = {
        "source": described,
        "model": args.model,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "retention_ratio": args.retention_ratio,
        "policy": args.policy,
        "method": args.method,
        "filter": dataclasses.asdict(judge),
    }
    return items, judge, teacher, AnnotationLog(args.output.with_suffix(".log.jsonl"), settings)


def run(
    args: argparse.Namespace,
    items: Items,
    judge: CaptionFilter,
    teacher: TeacherConfig | BatchOptions,
    log: AnnotationLog,
) -> int:
    """Ask, and write what was answered.

    Returns:
        The exit code.

    Raises:
        TeacherError: the endpoint or an engine gave up; the log keeps what was answered.
    """
    from score_vllm.train.annotate.run import annotate, write_results
    from score_vllm.train.annotate.teacher import Teacher, TeacherConfig

    failures = args.output.with_suffix(".failures.jsonl")

    async def ask(endpoint: TeacherConfig) -> None:
        async with Teacher(endpoint) as asked:
            await annotate(items, asked, judge, log, args.concurrency, args.retry_rejected, args.quiet)

    try:
        if isinstance(teacher, TeacherConfig):
            asyncio.run(ask(teacher))
        else:
            from score_vllm.train.annotate.batch import annotate_in_batches

            annotate_in_batches(items, teacher, judge, log, args.retry_rejected, args.quiet)
        summary = write_results(items, log, args.output, failures, args.model)
    finally:
        log.close()
    print(f"annotate: {summary.kept} kept" + (f": {args.output}" if summary.kept else "; no file is written"))
    for reason, count in sorted(summary.rejected.items()):
        print(f"annotate: {count} rejected, {reason}: {REASONS[reason]}")
    if summary.failed:
        print(f"annotate: {summary.failed} failed")
    if summary.failed or summary.rejected:
        print(f"annotate: named in {failures}")
    return EXIT_FAILED if summary.failed else 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m score_vllm.train.annotate``."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="annotate: %(levelname)s: %(message)s")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from score_vllm.catalog import UsageError
    from score_vllm.train.annotate.log import LogError
    from score_vllm.train.annotate.teacher import TeacherError

    try:
        opened = open_all(args)
    except (LogError, OSError, UsageError, ValueError) as error:
        print(f"annotate: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    try:
        code = run(args, *opened)
    except TeacherError as error:
        print(f"annotate: stopped: {error}\nannotate: run the same command again to go on", file=sys.stderr)
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        print("annotate: interrupted; run the same command again to go on", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
