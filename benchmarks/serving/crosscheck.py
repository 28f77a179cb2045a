"""The same load through vLLM's own ``bench serve`` and through our client, on the same servers.

    python -m benchmarks.serving.crosscheck        # a few minutes on two quiet cores
    python -m benchmarks.serving.crosscheck --quick

Two clients that share no code should agree on throughput, TTFT and time per output token (TPOT). Inter-token latency is
not compared: ``bench serve`` counts the gap between the empty role chunk and the first token's chunk, which come
together, as one more (very short) latency per request. The prompt tokens that ``bench serve`` saw are checked against
the exact number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import at_least, ratios
from benchmarks.report.serving import BENCH_SERVE
from benchmarks.serving.aggregate import aggregate
from benchmarks.serving.client import Counts
from benchmarks.serving.load import make_requests, question, run_level
from benchmarks.serving.server import KINDS, SERVED_NAME, VLLM_CLI, Server, running
from benchmarks.serving.setup import answers_of, check_ratio_one, parse, prepare, serving_parser


def write_sharegpt(path: Path, clips: Sequence[Path], texts: Sequence[str]) -> None:
    """Clips and questions as ``bench serve --dataset-name sharegpt`` reads them: LLaVA's form with a ``video`` path."""
    turns = [
        {
            "id": str(number),
            "video": str(clip),
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "An answer."}],
        }
        for number, (clip, text) in enumerate(zip(clips, texts, strict=True))
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


def compared(client: str, failures: int, rate: float, prompt_tokens: int, *times: float | None) -> dict[str, Any]:
    """What is compared; times are TTFT p50 and p95 and TPOT p50, in milliseconds."""
    named = dict(zip(("ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms"), times, strict=True))
    row = {"client": client, "failures": failures, "requests_per_second": rate, "prompt_tokens": prompt_tokens}
    return row | named


def bench_row(result: dict[str, Any]) -> dict[str, Any]:
    """Of ``bench serve``'s result file."""
    times = (result[key] for key in ("median_ttft_ms", "p95_ttft_ms", "median_tpot_ms"))
    counted = result["failed"], result["request_throughput"], result["total_input_tokens"]
    return compared(BENCH_SERVE, *counted, *times)


def our_row(row: dict[str, Any]) -> dict[str, Any]:
    """Of our own aggregate."""
    ttft, tpot = row["ttft_ms"] or {}, row["tpot_ms"] or {}
    counted = row["failures"], row["requests_per_second"], row["prompt_tokens"]
    return compared("ours", *counted, ttft.get("p50"), ttft.get("p95"), tpot.get("p50"))


def main() -> None:
    parser = serving_parser(__doc__, frames=16)
    add = parser.add_argument
    add("--ratio", type=ratios, default="0.1", help="one retention ratio (default %(default)s)")
    add("--concurrency", type=at_least(1), default=4, help="users (default %(default)s)")
    add("--requests", type=at_least(1), default=24, help="per client and server (default %(default)s)")
    add("--max-tokens", type=at_least(1), default=16, help="generated per request (default %(default)s)")
    args = parse(parser, max_tokens=4, requests=4, concurrency=2)
    setup = prepare("crosscheck", args, args.requests + 2, args.max_tokens)
    checks, clips = [clip.as_uri() for clip in setup.clips[:2]], setup.clips[2:]
    visual, plain, rows = args.shape.visual_tokens, [], []
    for kind, ratio in zip(KINDS, (None, args.ratio[0]), strict=True):
        with running(kind, setup.options, setup.folder) as server:
            first = answers_of(server, checks, None if ratio is None else 1.0, question(0))
            plain = plain or first
            counts = Counts(visual, plain[0].usage["prompt_tokens"] - visual)
            if ratio is not None and check_ratio_one(plain, first) != counts:
                sys.exit("correctness check failed: the processor resized the clips; choose another size")
            answers_of(server, checks, ratio)
            requests = make_requests(counts, clips, (ratio,), args.requests, max_tokens=args.max_tokens)
            records, _ = run_level(server.url, SERVED_NAME, requests, args.concurrency)
            dataset = setup.folder / kind / "sharegpt.json"
            dataset.parent.mkdir()
            write_sharegpt(dataset, clips, [request.text for request in requests])
            sizes = args.concurrency, args.requests, args.max_tokens
            command = bench_command(server, setup.model.path, dataset, *sizes, ratio)
            exact = counts.prompt(ratio) * args.requests
            for row in (our_row(aggregate(records, args.requests)), bench_row(run_bench(command, dataset.parent))):
                if row["failures"] or row["prompt_tokens"] != exact:
                    sys.exit(f"{row['client']} on {kind}: {row}, but no failure and {exact} prompt tokens are right")
                rows.append({"config": kind, "retention_ratio": ratio, **row})
    setup.publish(rows)


if __name__ == "__main__":
    main()
