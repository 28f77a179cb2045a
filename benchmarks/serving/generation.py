"""Token generation while no prefill runs: streams that all generate at once, vanilla and SCORE in turn.

    python -m benchmarks.serving.generation            # about 10 minutes on two quiet cores
    python -m benchmarks.serving.generation --quick

Under load most gaps between tokens hold the prefill of somebody else's video (load.py). Here N requests are sent at
once, and only what lies between the last one's first token and the first one's last token counts: every step in that
window decodes all N streams and nothing else. Both servers stay up and take turns, round by round, so a machine that
changes its pace hits both. Every answer is checked: its tokens, its prompt's exact length, the server's report.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Sample, at_least, integers, ratios, rounds, row_name
from benchmarks.serving.client import Answer, Counts, Request, ask
from benchmarks.serving.server import KINDS, SERVED_NAME, Server, running
from benchmarks.serving.setup import QUESTION, answers_of, check_ratio_one, parse, prepare, serving_parser

# Gaps that a round must have in its window, over all streams.
FEWEST = 8


def shared_gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between tokens while every stream was generating, of requests that were sent together."""
    begin = max(answer.arrivals[0][0] for answer in answers)
    end = min(answer.arrivals[-1][0] for answer in answers)
    return [gap for answer in answers for gap in answer.gaps(begin, end)]


def one_round(
    server: Server, clips: Sequence[Path], ratio: float | None, max_tokens: int, counts: Counts, _: int
) -> float:
    """Median gap in milliseconds of one round, with a stream per clip.

    Raises:
        SystemExit: an answer is wrong, or the streams hardly overlapped.
    """
    requests = [Request(clip.as_uri(), QUESTION, max_tokens, ratio, counts) for clip in clips]
    gaps = shared_gaps(ask(server.url, SERVED_NAME, requests))
    if len(gaps) < FEWEST:
        sys.exit(f"{len(clips)} streams generated together for {len(gaps)} gaps only; raise --max-tokens")
    return statistics.median(gaps) * 1000


def main() -> None:
    parser = serving_parser(__doc__, frames=16)
    add = parser.add_argument
    add("--ratios", type=ratios, default="0.4,0.25,0.1", help="with commas between (default %(default)s)")
    add("--streams", type=integers, default="1,4,16", help="streams at once, with commas between")
    add("--max-tokens", type=at_least(2), default=64, help="generated per stream")
    add("--repeats", type=at_least(1), default=3, help="rounds")
    args = parse(parser, max_tokens=16, ratios=[0.1], streams=[1, 2], repeats=1)
    setup = prepare("generation", args, 1 + max(args.streams), args.max_tokens)
    warm, *clips = setup.clips
    with (
        running(KINDS[0], setup.options, setup.folder) as vanilla,
        running(KINDS[1], setup.options, setup.folder) as score,
    ):
        plain, whole = (answers_of(server, [warm.as_uri()], r) for server, r in ((vanilla, None), (score, 1.0)))
        counts = check_ratio_one(plain, whole)
        keys = [(streams, ratio) for streams in args.streams for ratio in (None, *args.ratios)]
        calls = {
            str(key): partial(
                one_round, vanilla if key[1] is None else score, clips[: key[0]], key[1], args.max_tokens, counts
            )
            for key in keys
        }
        times = rounds(calls, args.repeats, warm_up=0, label="rounds")
    rows = [
        {
            "row": row_name(ratio),
            "retention_ratio": ratio,
            "streams": streams,
            "gap_ms": Sample(tuple(times[str((streams, ratio))])).to_json(),
        }
        for streams, ratio in keys
    ]
    setup.publish(rows)


if __name__ == "__main__":
    main()
