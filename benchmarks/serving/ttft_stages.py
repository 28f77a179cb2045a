"""Where the time to first token goes: one request at a time through the real servers, split into its stages.

    python -m benchmarks.serving.ttft_stages            # meant to stay within 5 minutes on two quiet cores
    python -m benchmarks.serving.ttft_stages --quick
    python -m benchmarks.serving.ttft_stages --reuse --frames 60 --repeats 6
    python -m benchmarks.serving.ttft_stages --model Qwen/Qwen2.5-VL-7B-Instruct --policy DIR --dtype bfloat16 \\
        --frames 128 --server-args="--gpu-memory-utilization 0.45"     # two servers share the GPU

A vanilla server and a compressed one run side by side; rows take turns over clips that are new to both, and every cache
is off. Half-way both are started anew in the other order: of two servers on one machine, the one started second was
seen to be slower by some per cent, whichever it was. The client fetches nothing: the server downloads each clip over
HTTP (from the loopback, so a real network adds its own), decodes, preprocesses, encodes, selects, prefills. Stopwatches
inside the servers stand between those stages (inserver/score_bench_plugin.py); what lies between them is "hand-over".
vLLM's own queue, prefill and TTFT metrics and ``score_compressor_seconds`` of the same requests stand beside them.

``--reuse`` times requests whose cells were encoded before (reuse.py): another ratio, a window that slides, a clip that
grows, a slide show; against vanilla, and against the same server without a cell cache. 6 repeats take a quarter of an
hour on two cores.

Before anything is timed: answers at ratio 1 must equal vanilla's, and every prompt must have exactly its tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import Sample, at_least, ratios, row_name
from benchmarks.serving.client import Answer, Counts, Request, ask
from benchmarks.serving.server import KINDS, SERVED_NAME, Server, file_server, running
from benchmarks.serving.setup import QUESTION, Setup, answers_of, check_ratio_one, parse, prepare, serving_parser
from benchmarks.serving.stage_split import STAGES, SpanReader, split

# Histogram sums whose growth over the timed requests is reported beside ours, in seconds.
OWN_METRICS = {
    "queue": "vllm:request_queue_time_seconds_sum",
    "prefill": "vllm:request_prefill_time_seconds_sum",
    "ttft": "vllm:time_to_first_token_seconds_sum",
    "compress": "score_compressor_seconds_sum",
}
Runs = dict[float | None, list[dict[str, Any]]]


def summarise(ratio: float | None, counts: Counts, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results: medians and spreads, in milliseconds, over the repeats of one row."""
    stages = {stage: Sample(tuple(run["stages"][stage] * 1000 for run in runs)) for stage in STAGES}
    ttft = Sample(tuple(sum(run["stages"].values()) * 1000 for run in runs))
    own = {key: Sample(tuple(run["own"][key] * 1000 for run in runs)).to_json() for key in runs[0]["own"]}
    return {
        "row": row_name(ratio),
        "retention_ratio": ratio,
        "visual_tokens": counts.kept(ratio),
        "prompt_tokens": counts.prompt(ratio),
        "ttft_ms": ttft.to_json(),
        "stages_ms": {stage: sample.to_json() for stage, sample in stages.items()},
        "metrics_ms": own,
    }


def measure(server: Server, reader: SpanReader, request: Request) -> tuple[dict[str, Any], Answer]:
    """Stages of one request and the growth of the server's own metrics, in seconds, and its answer.

    Raises:
        SystemExit: its answer is not right.
    """
    before = server.metrics()
    reader.new()
    (answer,) = ask(server.url, SERVED_NAME, [request])
    stages = split(reader.new(), answer.sent, answer.arrivals[0][0], compressed=request.ratio is not None)
    after = server.metrics()
    own = {key: after[name] - before.get(name, 0.0) for key, name in OWN_METRICS.items() if name in after}
    return {"stages": stages, "own": own}, answer


def start_and_measure(
    kinds: Sequence[str], setup: Setup, checks: list[str], urls: Sequence[str], rows: Sequence[float | None]
) -> tuple[Counts, Runs]:
    """Both servers, started in this order and checked; then every clip through every row, rows in turn."""
    servers: dict[str, Server] = {}
    readers: dict[str, SpanReader] = {}
    runs: Runs = {row: [] for row in rows}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            place = Path(tempfile.mkdtemp(prefix=f"spans-{kind}-", dir=setup.folder))
            readers[kind] = SpanReader(place)
            servers[kind] = stack.enter_context(running(kind, replace(setup.options, spans=place), setup.folder))
        plain, whole = answers_of(servers["vanilla"], checks, None), answers_of(servers["score"], checks, 1.0)
        counts = check_ratio_one(plain, whole)
        for ratio in rows[1:]:
            answers_of(servers["score"], checks, ratio)  # warms what the ratio needs
        for url, row in tqdm(list(itertools.product(urls, rows)), desc="requests", unit="request"):
            kind = "vanilla" if row is None else "score"
            request = Request(url, QUESTION, 1, row, counts)
            runs[row].append(measure(servers[kind], readers[kind], request)[0])
    return counts, runs


def main() -> None:
    parser = serving_parser(__doc__, frames=32)
    parser.add_argument("--ratios", type=ratios, default="1,0.4,0.25,0.1", help="with commas between")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="clips; each goes through every row")
    parser.add_argument("--reuse", action="store_true", help="requests whose cells were encoded before")
    parser.add_argument("--cell-cache-gib", type=float, default=1, help="with --reuse (default %(default)s)")
    args = parse(parser, repeats=2)
    if args.reuse:
        from benchmarks.serving import reuse

        args.ratios = args.ratios[-1:] + args.ratios[-2:-1]
        if len(args.ratios) != 2:
            parser.error("--reuse needs two --ratios: the lowest is asked for first, the next one after it")
        setup = prepare("reuse", args, 2, 0)
        with file_server(setup.folder / "media") as base:
            reuse.run(setup, args, base)
        return
    setup = prepare("ttft_stages", args, args.repeats + 2, 0)
    rows: list[float | None] = [None, *args.ratios]
    runs: Runs = {row: [] for row in rows}
    with file_server(setup.folder / "media") as base:
        # The first two clips are for the check, which warms the servers besides; the rest are new to them.
        first, second, *timed = [f"{base}/{path.name}" for path in setup.clips]
        half = -(-len(timed) // 2)
        for kinds, part in zip((KINDS, KINDS[::-1]), (timed[:half], timed[half:]), strict=True):
            if part:
                counts, found = start_and_measure(kinds, setup, [first, second], part, rows)
                for row in rows:
                    runs[row] += found[row]
    results = [summarise(row, counts, runs[row]) for row in rows]
    setup.publish(results, download="HTTP over the loopback")


if __name__ == "__main__":
    main()
