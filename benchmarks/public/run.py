"""Accuracy on a public video question set, at one or several retention ratios side by side.

Answers go into a JSON-lines file as they come; the same command, repeated, goes on where it stopped and asks failed
requests again. With any failed request the score is withheld and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, RUNS, at_least
from benchmarks.public.answers import Answers, ratio_name
from benchmarks.public.evaluate import NEWLINES, SEND, Plan, Videos, ask_all, probe
from benchmarks.public.formats import SETS, digest, read_questions
from benchmarks.public.prompts import VARIANTS
from benchmarks.public.rows import FormatError
from benchmarks.public.scoring import Score, score
from benchmarks.report import publish
from score_vllm.client import Client, Endpoint, RequestFailed

SHOWN_FAILURES = 20


def ratio(text: str) -> float | None:
    """One value of --retention-ratio."""
    from score_vllm.budget import check_retention_ratio

    if text == "default":
        return None
    try:
        return check_retention_ratio(float(text), "--retention-ratio")
    except ValueError:
        message = f"must be a number in (0, 1], or 'default' for the server's own, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def above_zero(text: str) -> float:
    """A finite number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all public sets."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="annotation file of the set (.parquet, .json, .jsonl), or its folder")
    add("--videos", type=Path, required=True, help="folder of the set's videos, as the published archives unpack")
    add("--base-url", default="http://127.0.0.1:8000/v1", help="the endpoint's root")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY, else none")
    add("--model", default=None, help="default: the one model that the endpoint lists")
    add("--retention-ratio", type=ratio, nargs="+", default=[1.0], metavar="R", help="one or several; or 'default'")
    add("--retention-method", default=None, help="default: the server's")
    add("--prompt", choices=VARIANTS, default="official", help="whose wording of the question")
    add("--send", choices=SEND, default="base64", help="file: the server opens the path; base64: inside the request")
    add("--server-videos", default=None, help="--send file: the videos' folder as the server sees it")
    add("--video-base-url", default=None, help="--send url: the URL at which the videos' folder is served")
    add("--video-fps", type=above_zero, default=None, help="frames per second to read (score-serve; default: its own)")
    add(
        "--video-max-frames", type=at_least(1), default=None, help="most frames to read (score-serve; default: its own)"
    )
    add("--max-tokens", type=at_least(1), default=16, help="most tokens of an answer")
    add("--limit", type=at_least(1), default=None, help="only the first N questions; not a figure to publish")
    add("--concurrency", type=at_least(1), default=4, help="most requests in flight")
    add("--retries", type=at_least(0), default=5, help="of a request, after 5xx, 429, timeouts, lost connections")
    add("--timeout", type=at_least(1), default=1800, help="seconds for one attempt")
    add("--max-failures", type=at_least(1), default=50, help="stop after this many failed requests")
    add("--allow-failures", action="store_true", help="score the answered questions even where requests failed")
    add("--transformers", type=Path, metavar="DIR", help="ask this checkpoint in this process, not an endpoint")
    add("--policy", default=None, help="--transformers: directory of its retention policy")
    add(
        "--newlines",
        choices=NEWLINES,
        default="all",
        help="--transformers: LLaVA-Video's newlines; kept-rows: those of rows that keep a token (FastVID's rule)",
    )
    add("--no-probe", action="store_true", help="do not verify that the server compresses (the results say so)")
    add(
        "--output",
        type=Path,
        default=None,
        help="results file (default: benchmarks/results/accuracy_<set>_<model>.json; runs/ for a part of a set)",
    )
    add("--answers", type=Path, default=None, help="file of answers (default: beside the results file)")


def _videos(args: argparse.Namespace) -> Videos:
    if not args.videos.is_dir():
        raise FormatError(f"--videos must be a folder, got {args.videos}")
    if args.transformers is None and (args.policy is not None or args.newlines != "all"):
        raise FormatError("--policy and --newlines go with --transformers")
    if args.transformers is not None and args.send == "url":
        raise FormatError("--send url goes with an endpoint, not with --transformers")
    if (args.send == "url") != (args.video_base_url is not None):
        raise FormatError("--send url and --video-base-url go together")
    if args.server_videos is not None and args.send != "file":
        raise FormatError("--server-videos goes with --send file")
    if args.server_videos is not None and not args.server_videos.startswith("/"):
        raise FormatError(f"--server-videos must be an absolute path, got {args.server_videos!r}")
    return Videos(args.videos, args.send, args.video_base_url or args.server_videos)


def main(args: argparse.Namespace) -> int:
    """Run one set; 0: scored, 1: withheld or stopped, 2: wrong input."""
    try:
        videos = _videos(args)
        return asyncio.run(_main(args, videos))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RequestFailed as error:
        print(f"error: {error}; nothing was scored", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130


async def only_model(client: Endpoint) -> str:
    """The name of the one model that the endpoint serves.

    Raises:
        RequestFailed: no answer, or not exactly one model.
    """
    names = await client.models()
    if len(names) != 1:
        raise RequestFailed(f"{client.base_url}/models lists {names}; choose one with --model")
    return names[0]


def connect(args: argparse.Namespace) -> Any:
    """What is asked: an endpoint, or a checkpoint in this process."""
    if args.transformers is None:
        return Client(args.base_url, args.api_key, timeout=args.timeout, retries=args.retries)
    import torch

    from benchmarks.in_process import InProcess

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    return InProcess(args.transformers, args.policy, args.newlines, dtype, "cuda" if gpu else "cpu")


async def _main(args: argparse.Namespace, videos: Videos) -> int:
    chosen = SETS[args.benchmark]
    questions = read_questions(args.benchmark, args.data)
    content = digest(questions)
    if len(questions) != chosen.size:
        print(f"note: {len(questions)} questions here, {chosen.size} in the published set", file=sys.stderr)
    questions = questions[: args.limit]
    ratios = list(dict.fromkeys(args.retention_ratio))
    async with connect(args) as client:
        model = args.model or await only_model(client)
        fields = model, args.retention_method, args.prompt, args.max_tokens, args.max_failures, videos
        given = {"video_fps": args.video_fps, "video_max_frames": args.video_max_frames}
        reading = {name: value for name, value in given.items() if value is not None}
        plan = Plan(args.benchmark, questions, ratios, *fields, reading)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name)
        # A part of a set is no result.
        place = RESULTS if len(questions) == chosen.size else RUNS
        output = args.output or place / f"accuracy_{args.benchmark}_{name}.json"
        configuration = {
            "benchmark": args.benchmark,
            "questions": content,
            "base_url": client.base_url,
            "model": model,
            "retention_method": args.retention_method,
            "prompt": args.prompt,
            "max_tokens": args.max_tokens,
            **reading,
            **({} if args.transformers is None else {"newlines": args.newlines, "policy": args.policy}),
        }
        answers = Answers(args.answers or output.with_suffix(".answers.jsonl"), configuration)
        try:
            probed = {} if args.no_probe else await probe(client, plan)
            went_through = await ask_all(client, plan, answers, args.concurrency)
        finally:
            answers.close()
    scores = [score(chosen, questions, answers, r, args.allow_failures) for r in ratios]
    facts: dict[str, Any] = {
        "title": chosen.title,
        "headline": chosen.headline,
        "published_size": chosen.size,
        "asked": len(questions),
        "probe": probed or None,
        "over_answered_only": args.allow_failures and not all(s.complete for s in scores),
    }
    publish("accuracy_public", output, [s.to_json() for s in scores], **configuration, **facts)
    print(f"answers: {os.path.relpath(answers.path)}")
    name_failures(scores, args.allow_failures)
    if not went_through:
        print(f"stopped after {args.max_failures} failed requests (--max-failures)", file=sys.stderr)
    return 0 if all(s.complete for s in scores) else 1


def name_failures(scores: list[Score], allowed: bool) -> None:
    """Say on standard error what the table cannot: which requests failed and why."""
    for s in scores:
        if len(s.methods) > 1:
            print(f"ratio {ratio_name(s.ratio)}: MIXED METHODS {', '.join(s.methods)}", file=sys.stderr)
        if s.failed:
            print(f"ratio {ratio_name(s.ratio)}: {len(s.failed)} failed request(s)", file=sys.stderr)
        for question, reason in list(s.failed.items())[:SHOWN_FAILURES]:
            print(f"  {question}: {reason}", file=sys.stderr)
        if len(s.failed) > SHOWN_FAILURES:
            print(f"  ... and {len(s.failed) - SHOWN_FAILURES} more, in the results file", file=sys.stderr)
    if not allowed and any(s.headline is None for s in scores):
        print("a score is withheld while requests fail; repeat the command to ask them again", file=sys.stderr)
