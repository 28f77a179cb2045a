"""Where the time to first token goes: one request at a time through the real servers, split into its stages.

    python benchmarks/ttft_stages.py            # meant to stay within 5 minutes on two quiet cores
    python benchmarks/ttft_stages.py --quick
    python benchmarks/ttft_stages.py --model Qwen/Qwen2.5-VL-7B-Instruct --policy DIR --dtype bfloat16 \\
        --frames 128 --server-args="--gpu-memory-utilization 0.45"     # two servers share the GPU

A vanilla server and a compressed one run side by side; rows take turns over clips that are new to both, and every cache
is off. Half-way both are started anew in the other order: of two servers on one machine, the one
started second was seen to be slower by some per cent, whichever it was. The client fetches nothing: the server
downloads each clip over HTTP (from the loopback, so a real network adds its own), decodes, preprocesses, encodes,
selects, prefills. Stop-watches stand at the doors between those stages, inside the servers
(inserver/score_bench_plugin.py); what lies between the doors is "hand-over". vLLM's own queue, prefill and TTFT metrics
and ``score_compressor_seconds`` of the same requests stand beside them.

Before anything is timed: answers at ratio 1 must equal vanilla's, and every prompt must have exactly its tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent))
from bench_model import add_arguments, resolve_model
from clips import ClipShape, add_clip_arguments, write_clips
from harness import Sample, default_output, machine_name, table, write_results
from report_blocks import save_picture
from report_blocks.ttft_stages import picture
from serving import KINDS, SERVED_NAME, Server, ServerOptions, file_server, running, stream
from stage_split import STAGES, SpanReader, split
from streaming import chat_body

QUESTION = "What happens?"
# Histogram sums whose growth over the timed requests is reported beside ours, in seconds.
OWN_METRICS = {
    "queue": "vllm:request_queue_time_seconds_sum",
    "prefill": "vllm:request_prefill_time_seconds_sum",
    "ttft": "vllm:time_to_first_token_seconds_sum",
    "compress": "score_compressor_seconds_sum",
}


def check_answers(
    servers: dict[str, Server], urls: Sequence[str], ratios: Sequence[float]
) -> dict[float | None, dict[str, int]]:
    """Answers before times; returns visual and prompt tokens per row.

    Raises:
        SystemExit: an answer at ratio 1 differs from vanilla's, or a count is not exact.
    """
    from score_vllm import num_retained_tokens

    counts: dict[float | None, dict[str, int]] = {}
    for url in urls:
        plain = stream(servers["vanilla"], chat_body(SERVED_NAME, url, QUESTION, 8, None, token_ids=True))
        whole = stream(servers["score"], chat_body(SERVED_NAME, url, QUESTION, 8, 1.0, token_ids=True))
        prompt = int(plain.usage["prompt_tokens"])
        (video,) = (whole.score or {"videos": []})["videos"] or [{"original_tokens": -1}]
        original = video["original_tokens"]
        wrong = plain.problem(8, None, None) or whole.problem(8, prompt, original)
        if wrong is None and not (plain.ids == whole.ids and len(plain.ids) == 8):
            wrong = f"vanilla's tokens are {plain.ids} and those of SCORE at ratio 1 {whole.ids}"
        if wrong is not None:
            sys.exit(f"correctness check failed: {wrong}; nothing was timed")
        counts[None] = {"visual": original, "prompt": prompt}
        for ratio in ratios:
            kept = num_retained_tokens(original, ratio)
            counts[ratio] = {"visual": kept, "prompt": prompt - original + kept}
            answer = stream(servers["score"], chat_body(SERVED_NAME, url, QUESTION, 8, ratio))
            wrong = wrong or answer.problem(8, counts[ratio]["prompt"], kept)
        if wrong is not None:
            sys.exit(f"correctness check failed: {wrong}; nothing was timed")
    return counts


def summarise(name: str, ratio: float | None, count: dict[str, int], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results: medians and spreads, in milliseconds, over the repeats of one row."""
    stages = {stage: Sample(tuple(run["stages"][stage] * 1000 for run in runs)) for stage in STAGES}
    ttft = Sample(tuple(sum(run["stages"].values()) * 1000 for run in runs))
    own = {key: Sample(tuple(run["own"][key] * 1000 for run in runs)).to_json() for key in runs[0]["own"]}
    return {
        "row": name,
        "retention_ratio": ratio,
        "visual_tokens": count["visual"],
        "prompt_tokens": count["prompt"],
        "ttft_ms": ttft.to_json(),
        "stages_ms": {stage: sample.to_json() for stage, sample in stages.items()},
        "metrics_ms": own,
    }


def measure(
    servers: dict[str, Server],
    readers: dict[str, SpanReader],
    clips: Sequence[str],
    rows: Sequence[float | None],
    counts: dict[float | None, dict[str, int]],
) -> dict[float | None, list[dict[str, Any]]]:
    """Every clip through every row, rows in turn; per row, a run per clip."""
    runs: dict[float | None, list[dict[str, Any]]] = {row: [] for row in rows}
    order = list(itertools.product(clips, rows))
    for url, row in tqdm(order, desc="requests", unit="request"):
        kind = "vanilla" if row is None else "score"
        server = servers[kind]
        before = server.metrics()
        readers[kind].new()
        answer = stream(server, chat_body(SERVED_NAME, url, QUESTION, 1, row))
        kept = None if row is None else counts[row]["visual"]
        if wrong := answer.problem(1, counts[row]["prompt"], kept):
            sys.exit(f"a timed request failed: {wrong} (log: {server.log})")
        spans = readers[kind].new()
        stages = split(spans, answer.sent, answer.arrivals[0][0], compressed=row is not None)
        after = server.metrics()
        own = {key: after[name] - before.get(name, 0.0) for key, name in OWN_METRICS.items() if name in after}
        runs[row].append({"stages": stages, "own": own})
    return runs


def start_and_measure(
    kinds: Sequence[str],
    options: ServerOptions,
    folder: Path,
    check: Sequence[str],
    clips: Sequence[str],
    rows: Sequence[float | None],
) -> tuple[dict[float | None, dict[str, int]], dict[float | None, list[dict[str, Any]]]]:
    """Both servers, started in this order, checked and measured; ``(counts per row, runs per row)``."""
    servers: dict[str, Server] = {}
    readers: dict[str, SpanReader] = {}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            place = Path(tempfile.mkdtemp(prefix=f"spans-{kind}-", dir=folder))
            readers[kind] = SpanReader(place)
            servers[kind] = stack.enter_context(running(kind, replace(options, spans=place), folder))
        counts = check_answers(servers, check, [row for row in rows if row is not None])
        print("correctness: answers equal vanilla at ratio 1; every prompt has exactly its tokens")
        return counts, measure(servers, readers, clips, rows, counts)


def parse_arguments() -> tuple[argparse.Namespace, list[float]]:
    """Command line, checked; ``(arguments, ratios)``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ratios", default="1.0,0.4,0.25,0.1", help="comma-separated, each in (0, 1]")
    add_clip_arguments(parser, frames=32)
    parser.add_argument("--repeats", type=int, default=10, help="clips; each goes through every row")
    parser.add_argument("--server-args", default="", help="further options for both servers, in one quoted string")
    parser.add_argument("--output", type=Path, default=None, help="results file; the picture goes beside it as .png")
    parser.add_argument("--quick", action="store_true", help="small clips and two repeats: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.height, args.width, args.repeats = 8, 112, 112, 2
    try:
        ratios = [float(text) for text in args.ratios.split(",")]
        if not all(0 < ratio <= 1 for ratio in ratios):
            raise ValueError
    except ValueError:
        parser.error(f"--ratios must be numbers in (0, 1] with commas between, got {args.ratios!r}")
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {args.repeats}")
    return args, ratios


def main() -> None:
    args, ratios = parse_arguments()
    shape = ClipShape(args.frames, args.height, args.width)
    model = resolve_model(args.model, args.policy)
    folder = Path(tempfile.mkdtemp(prefix="score-ttft-"))
    clips = write_clips(folder / "media", shape, range(args.repeats + 2))
    length = shape.visual_tokens + 512
    rows: list[float | None] = [None, *ratios]
    runs: dict[float | None, list[dict[str, Any]]] = {row: [] for row in rows}
    counts: dict[float | None, dict[str, int]] = {}
    print(f"{machine_name()}; {model.description}, {shape}, {args.dtype}; server logs in {folder}")
    extra = shlex.split(args.server_args)
    options = ServerOptions(model, args.dtype, length, length, args.frames, folder / "media", extra=extra)
    with file_server(folder / "media") as base:
        # The first two clips are for the check, which warms the servers besides; the rest are new to them.
        first, second, *timed = [f"{base}/{path.name}" for path in clips]
        half = -(-len(timed) // 2)
        for kinds, part in zip((KINDS, KINDS[::-1]), (timed[:half], timed[half:]), strict=True):
            if part:
                counts, found = start_and_measure(kinds, options, folder, (first, second), part, rows)
                for row in rows:
                    runs[row] += found[row]

    names = {row: "vanilla" if row is None else f"SCORE {row:.0%}" for row in rows}
    results = [summarise(names[row], row, counts[row], runs[row]) for row in rows]
    base_ttft = results[0]["ttft_ms"]["median"]
    printed = []
    for result in results:
        cells = [f"{result['stages_ms'][stage]['median']:.0f}" for stage in STAGES]
        ttft = result["ttft_ms"]
        times = [f"{ttft['median']:.0f} ± {ttft['spread']:.0f}", f"{base_ttft / ttft['median']:.2f}x"]
        printed.append([result["row"], str(result["prompt_tokens"]), *cells, *times])
    print(table(["medians, ms", "prompt", *STAGES, "TTFT", "vs vanilla"], printed))
    output = args.output or default_output("ttft_stages", args.model, args.quick)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    facts = {"arguments": arguments, "model": model.description, "download": "HTTP over the loopback"}
    write_results(output, results, benchmark="ttft_stages", **facts)
    save_picture(output, picture)
    print(f"written: {os.path.relpath(output)} and {output.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
