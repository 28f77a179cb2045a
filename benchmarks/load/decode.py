"""Decode speed with nobody's prefill in the way: streams that all generate at once, vanilla and SCORE in turn.

    python benchmarks/load/decode.py            # about 10 minutes on two quiet cores
    python benchmarks/load/decode.py --quick

Under load most gaps between tokens hold the prefill of somebody else's video (drive.py). Here N requests are sent at
once, and only what lies between the last one's first token and the first one's last token counts: every step in that
window decodes all N streams and nothing else. Both servers stay up and take turns, round by round, so a machine that
changes its pace hits both. Every answer is checked: its tokens, its prompt's exact length, the server's report.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench_model import add_arguments, resolve_model
from clips import ClipShape, add_clip_arguments, write_clips
from harness import Sample, default_output, machine_name, table, write_results
from serving import KINDS, SERVED_NAME, Server, ServerOptions, running, stream
from streaming import Answer, chat_body

QUESTION = "What happens?"
# Gaps that a round must have in its window, over all streams.
FEWEST = 8


def shared_gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between tokens while every stream was generating.

    Args:
        answers: finished, of requests that were sent together.

    Returns:
        Gaps between arrivals that both lie between the last first token and the first last token.
    """
    begin = max(answer.arrivals[0][0] for answer in answers)
    end = min(answer.arrivals[-1][0] for answer in answers)
    gaps = []
    for answer in answers:
        for (earlier, _), (later, count) in itertools.pairwise(answer.arrivals):
            if begin <= earlier and later <= end:
                gaps += [(later - earlier) / count] * count
    return gaps


def one_round(
    server: Server, clips: Sequence[Path], ratio: float | None, max_tokens: int, counts: tuple[int, int]
) -> float:
    """Median gap in milliseconds of one round.

    Args:
        server: vanilla or compressed.
        clips: one per stream.
        ratio: None for vanilla.
        max_tokens: generated per stream.
        counts: visual tokens of a clip, and text tokens of the prompt.

    Raises:
        SystemExit: an answer is wrong, or the streams hardly overlapped.
    """
    from score_vllm import num_retained_tokens

    def ask(clip: Path) -> Answer:
        return stream(server, chat_body(SERVED_NAME, f"file://{clip}", QUESTION, max_tokens, ratio))

    with ThreadPoolExecutor(len(clips)) as pool:
        answers = list(pool.map(ask, clips))
    kept = None if ratio is None else num_retained_tokens(counts[0], ratio)
    prompt = counts[1] + (counts[0] if kept is None else kept)
    if wrong := next(filter(None, (answer.problem(max_tokens, prompt, kept) for answer in answers)), None):
        sys.exit(f"a request failed: {wrong} (log: {server.log})")
    gaps = shared_gaps(answers)
    if len(gaps) < FEWEST:
        sys.exit(f"{len(clips)} streams generated together for {len(gaps)} gaps only; raise --max-tokens")
    return statistics.median(gaps) * 1000


def parse_arguments() -> argparse.Namespace:
    """Command line, checked; ``ratios`` and ``streams`` become lists of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ratios", default="0.4,0.25,0.1", help="comma-separated, each in (0, 1]")
    parser.add_argument("--streams", default="1,4,16", help="streams at once, comma-separated")
    add_clip_arguments(parser, frames=16)
    parser.add_argument("--max-tokens", type=int, default=64, help="generated per stream")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--output", type=Path, default=None, help="results file")
    parser.add_argument("--quick", action="store_true", help="small clips, few streams: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.height, args.width, args.max_tokens = 8, 112, 112, 16
        args.ratios, args.streams, args.repeats = "0.1", "1,2", 1
    try:
        args.ratios = [float(text) for text in args.ratios.split(",")]
        args.streams = [int(text) for text in args.streams.split(",")]
        if not all(0 < ratio <= 1 for ratio in args.ratios) or min(args.streams) < 1:
            raise ValueError
    except ValueError:
        parser.error("--ratios must be numbers in (0, 1], --streams integers >= 1, with commas between")
    if args.repeats < 1 or args.max_tokens < 2:
        parser.error("--repeats must be >= 1 and --max-tokens >= 2")
    return args


def main() -> None:
    args = parse_arguments()
    shape = ClipShape(args.frames, args.height, args.width)
    model = resolve_model(args.model, args.policy)
    folder = Path(tempfile.mkdtemp(prefix="score-decode-"))
    warm, *clips = write_clips(folder / "media", shape, range(1 + max(args.streams)))
    length = shape.visual_tokens + 512 + args.max_tokens
    options = ServerOptions(model, args.dtype, length, length, args.frames, folder / "media")
    print(f"{machine_name()}; {model.description}, {shape}, {args.max_tokens} tokens out; logs in {folder}")
    rows: list[float | None] = [None, *args.ratios]
    times: dict[tuple[int, float | None], list[float]] = {}
    with running(KINDS[0], options, folder) as vanilla, running(KINDS[1], options, folder) as score:
        plain, whole = (
            server.post(chat_body(SERVED_NAME, f"file://{warm}", QUESTION, 8, ratio, token_ids=True))
            for server, ratio in ((vanilla, None), (score, 1.0))
        )
        if plain["choices"][0]["token_ids"] != whole["choices"][0]["token_ids"]:
            sys.exit("correctness check failed: SCORE at ratio 1 answers other than vanilla; nothing was timed")
        print("correctness: answers equal vanilla at ratio 1; every answer is counted")
        counts = shape.visual_tokens, int(plain["usage"]["prompt_tokens"]) - shape.visual_tokens
        order = [(streams, row) for _ in range(args.repeats) for streams in args.streams for row in rows]
        for streams, row in tqdm(order, desc="rounds", unit="round"):
            server = vanilla if row is None else score
            found = one_round(server, clips[:streams], row, args.max_tokens, counts)
            times.setdefault((streams, row), []).append(found)
    results = [
        {
            "row": "vanilla" if row is None else f"SCORE {row:.0%}",
            "retention_ratio": row,
            "streams": streams,
            "gap_ms": Sample(tuple(values)).to_json(),
        }
        for (streams, row), values in times.items()
    ]
    print(
        table(["streams", "", "ms"], [[str(r["streams"]), r["row"], f"{r['gap_ms']['median']:.1f}"] for r in results])
    )
    output = args.output or default_output("decode", args.model, args.quick)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    write_results(output, results, benchmark="decode", arguments=arguments, model=model.description)
    print(f"written: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
