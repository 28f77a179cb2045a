"""The same load through vLLM's own ``bench serve`` and through our locust client, on the same servers.

    python benchmarks/load/crosscheck.py        # a few minutes on two quiet cores
    python benchmarks/load/crosscheck.py --quick

Two clients that share no code should agree on throughput, TTFT and time per output token (TPOT). Inter-token latency is
not compared: ``bench serve`` counts the gap between the empty role chunk and the first token's chunk, which come
together, as one more (very short) latency per request. The prompt tokens that ``bench serve`` saw are checked against
the exact number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from aggregate import aggregate
from bench_model import add_arguments, resolve_model
from clips import ClipShape, add_clip_arguments, write_clips
from harness import default_output, machine_name, table, write_results
from plan import Target, make_requests, question, run_locust
from serving import SERVED_NAME, VLLM_CLI, Server, ServerOptions, running
from streaming import chat_body


def write_sharegpt(path: Path, requests: Sequence[dict[str, Any]]) -> None:
    """The requests as ``bench serve --dataset-name sharegpt`` reads them: LLaVA's form with a ``video`` path."""
    turns = [
        {
            "id": str(request["id"]),
            "video": request["clip"],
            "conversations": [{"from": "human", "value": request["text"]}, {"from": "gpt", "value": "An answer."}],
        }
        for request in requests
    ]
    path.write_text(json.dumps(turns, indent=1))


def bench_command(
    server: Server, tokenizer: str, dataset: Path, concurrency: int, count: int, max_tokens: int, ratio: float | None
) -> list[str]:
    """The ``bench serve`` call; its result file goes to ``bench.json`` beside the dataset."""
    command = [sys.executable, str(VLLM_CLI), "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", server.url, "--endpoint", "/v1/chat/completions"]
    command += ["--model", tokenizer, "--served-model-name", SERVED_NAME, "--tokenizer", tokenizer]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle"]
    command += ["--num-prompts", str(count), "--max-concurrency", str(concurrency)]
    command += ["--sharegpt-output-len", str(max_tokens), "--ignore-eos", "--temperature", "0"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99"]
    command += ["--save-result", "--result-dir", str(dataset.parent), "--result-filename", "bench.json"]
    if ratio is not None:
        command += ["--extra-body", json.dumps({"retention_ratio": ratio})]
    return command


def run_bench(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run it and read its result file.

    Raises:
        RuntimeError: it failed; its log is named.
    """
    log = folder / "bench.log"
    with log.open("wb") as sink:
        env = {**os.environ, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env=env, cwd=folder).returncode
    if code or not (folder / "bench.json").is_file():
        raise RuntimeError(f"bench serve ended with {code} (log: {log}):\n{log.read_text(errors='replace')[-2000:]}")
    return json.loads((folder / "bench.json").read_text())


def bench_row(result: dict[str, Any]) -> dict[str, Any]:
    """What of ``bench serve``'s result is compared, under our names."""
    return {
        "client": "vllm bench serve",
        "completed": result["completed"],
        "failures": result["failed"],
        "requests_per_second": result["request_throughput"],
        "prompt_tokens": result["total_input_tokens"],
        "ttft_p50_ms": result["median_ttft_ms"],
        "ttft_p95_ms": result["p95_ttft_ms"],
        "tpot_p50_ms": result["median_tpot_ms"],
    }


def locust_row(row: dict[str, Any]) -> dict[str, Any]:
    """The same of ours."""
    return {
        "client": "locust",
        "completed": row["requests"] - row["failures"],
        "failures": row["failures"],
        "requests_per_second": row["requests_per_second"],
        "prompt_tokens": row["prompt_tokens"],
        "ttft_p50_ms": None if row["ttft_ms"] is None else row["ttft_ms"]["p50"],
        "ttft_p95_ms": None if row["ttft_ms"] is None else row["ttft_ms"]["p95"],
        "tpot_p50_ms": None if row["tpot_ms"] is None else row["tpot_ms"]["p50"],
    }


def parse_arguments() -> argparse.Namespace:
    """Command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    add_clip_arguments(parser, frames=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=None, help="results file")
    parser.add_argument("--quick", action="store_true", help="small clips, few requests: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.height, args.width, args.max_tokens, args.requests, args.concurrency = 8, 112, 112, 4, 4, 2
    if not 0 < args.ratio <= 1:
        parser.error(f"--ratio must be in (0, 1], got {args.ratio}")
    for name in ("concurrency", "requests", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_arguments()
    shape = ClipShape(args.frames, args.height, args.width)
    model = resolve_model(args.model, args.policy)
    folder = Path(tempfile.mkdtemp(prefix="score-crosscheck-"))
    media = folder / "media"
    warm, *clips = write_clips(media, shape, range(args.requests + 1))
    length = shape.visual_tokens + 512 + args.max_tokens
    options = ServerOptions(model, args.dtype, length, length, args.frames, media)
    print(f"{machine_name()}; {model.description}, {shape}, {args.dtype}; logs in {folder}")
    rows: list[dict[str, Any]] = []
    text_tokens = 0
    for kind, ratio in (("vanilla", None), ("score", args.ratio)):
        with running(kind, options, folder) as server:
            body = chat_body(SERVED_NAME, f"file://{warm}", question(0), 1, ratio)
            prompt = int(server.post(body)["usage"]["prompt_tokens"])
            if kind == "vanilla":
                text_tokens = prompt - shape.visual_tokens
            target = Target(server.url, SERVED_NAME, shape.visual_tokens, text_tokens)
            requests = make_requests(target, clips, (ratio,), args.requests)
            records, _ = run_locust(target, requests, args.concurrency, folder / kind, args.max_tokens)
            dataset = folder / kind / "sharegpt.json"
            write_sharegpt(dataset, requests)
            command = bench_command(
                server, model.path, dataset, args.concurrency, args.requests, args.max_tokens, ratio
            )
            pair = [locust_row(aggregate(records, args.requests)), bench_row(run_bench(command, dataset.parent))]
            exact = sum(request["prompt_tokens"] for request in requests)
            for row in pair:
                if row["failures"] or row["prompt_tokens"] != exact:
                    sys.exit(f"{row['client']} on {kind}: {row}, but no failure and {exact} prompt tokens are right")
                rows.append({"config": kind, "retention_ratio": ratio, **row})
    header = ["", "client", "req/s", "TTFT p50 ms", "TTFT p95 ms", "TPOT p50 ms"]
    numbers = ("ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms")
    cells = [
        [row["config"], row["client"], f"{row['requests_per_second']:.2f}", *(f"{row[key]:.1f}" for key in numbers)]
        for row in rows
    ]
    print(table(header, cells))
    output = args.output or default_output("crosscheck", args.model, args.quick)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "output"}
    write_results(output, rows, benchmark="crosscheck", arguments=arguments, model=model.description)
    print(f"written: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
