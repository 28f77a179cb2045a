"""What every serving benchmark begins with: its options, model and clips, and the check that both servers agree."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clips import ClipShape, write_clips
from benchmarks.harness import at_least, default_output, machine_name, script_parser
from benchmarks.report import publish
from benchmarks.serving.client import Answer, Counts, Request, ask
from benchmarks.serving.model import BenchModel, resolve_model
from benchmarks.serving.server import SERVED_NAME, Server, ServerOptions

QUESTION = "What happens?"
CHECK_TOKENS = 8


def model_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that say what is run and where the results go."""
    parser = script_parser(doc)
    add = parser.add_argument
    add("--model", default="bench", help="'bench', 'demo', or a Qwen2.5-VL directory or hub id")
    add("--policy", default=None, help="retention policy; needed for real weights")
    add("--dtype", default="float32", help="float32 on a CPU, bfloat16 on a GPU")
    add("--kv-gib", type=at_least(1), default=2, help="KV cache on a CPU (default %(default)s)")
    add("--output", type=Path, default=None, help="results file; a picture goes beside it as .png")
    add("--quick", action="store_true", help="small clips and few requests: does it all work?")
    return parser


def serving_parser(doc: str | None, frames: int) -> argparse.ArgumentParser:
    """:func:`model_parser`, and the clips and servers."""
    parser = model_parser(doc)
    add = parser.add_argument
    add("--frames", type=at_least(4), default=frames, help="of a clip (default %(default)s)")
    add("--height", type=at_least(28), default=336, help="of a clip (default %(default)s)")
    add("--width", type=at_least(28), default=448, help="of a clip (default %(default)s)")
    add("--server-args", default="", help="further options for every server, in one quoted string")
    return parser


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> BenchModel:
    """The model of the command line, built where it must be."""
    try:
        return resolve_model(args.model, args.policy)
    except ValueError as error:
        parser.error(str(error))


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The command line; ``--quick`` sets small clips and the values given here."""
    args = parser.parse_args()
    if args.quick:
        vars(args).update({"frames": 8, "height": 112, "width": 112, **quick})
    try:
        args.shape = ClipShape(args.frames, args.height, args.width)
    except ValueError as error:
        parser.error(str(error))
    args.bench = resolve(parser, args)
    return args


@dataclass(frozen=True)
class Setup:
    """Model, clips and options of a run; ``folder`` also takes the logs."""

    name: str
    args: argparse.Namespace
    model: BenchModel
    folder: Path
    clips: list[Path]
    options: ServerOptions

    def publish(self, rows: list[dict[str, Any]], **facts: Any) -> None:
        """Write results, picture and table."""
        args = self.args
        output = args.output or default_output(self.name, args.model, args.quick)
        arguments = {key: str(value) for key, value in vars(args).items() if key not in ("output", "shape", "bench")}
        publish(self.name, output, rows, arguments=arguments, model=self.model.description, **facts)


def prepare(name: str, args: argparse.Namespace, clips: int, max_tokens: int) -> Setup:
    """Write the clips, and say what will run."""
    folder = Path(tempfile.mkdtemp(prefix=f"score-{name}-"))
    length = args.shape.visual_tokens + 512 + max_tokens
    media, extra = folder / "media", shlex.split(args.server_args)
    options = ServerOptions(args.bench, args.dtype, length, args.frames, media, args.kv_gib, extra)
    print(f"{machine_name()}; {args.bench.description}, {args.shape}, {args.dtype}; logs in {folder}")
    return Setup(name, args, args.bench, folder, write_clips(media, args.shape, range(clips)), options)


def answers_of(server: Server, urls: list[str], ratio: float | None, text: str = QUESTION) -> list[Answer]:
    """One short answer per video, one request after the other.

    Raises:
        SystemExit: one of them is not right.
    """
    requests = [Request(url, text, CHECK_TOKENS, ratio) for url in urls]
    return [ask(server.url, SERVED_NAME, [request])[0] for request in requests]


def check_ratio_one(plain: list[Answer], whole: list[Answer]) -> Counts:
    """Vanilla and SCORE at ratio 1 must give the same tokens for every video; returns the counts.

    Raises:
        SystemExit: they do not, or videos of one size have different counts.
    """
    found = set()
    for one, other in zip(plain, whole, strict=True):
        if one.ids != other.ids or len(one.ids) != CHECK_TOKENS:
            sys.exit(f"correctness check failed: vanilla's tokens are {one.ids}, SCORE's at ratio 1 {other.ids}")
        (video,) = (other.score or {})["videos"]
        original, prompt = video["original_tokens"], one.usage["prompt_tokens"]
        if video["retained_tokens"] != original or other.usage["prompt_tokens"] != prompt:
            sys.exit(f"correctness check failed: SCORE at ratio 1 reports {other.score} and {other.usage}")
        found.add(Counts(original, prompt - original))
    if len(found) != 1:
        sys.exit(f"correctness check failed: clips of one size have the counts {found}")
    print("correctness: tokens equal vanilla's at ratio 1; every answer and its counts are checked")
    return found.pop()
