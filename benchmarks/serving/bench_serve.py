"""vLLM's own ``bench serve`` on the same server with the same clips, beside locust's records of them.

Two clients that share no code should agree on throughput, TTFT and time per output token (TPOT). Inter-token latency is
not compared: ``bench serve`` counts the gap between the empty role chunk and the first token's chunk, which come
together, as one more (very short) latency per request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.serving import BENCH_SERVE
from benchmarks.serving.client import Request
from benchmarks.serving.process import tail
from benchmarks.serving.server import SERVED_NAME, VLLM_CLI

# Of a row, and where bench serve's result file and our aggregate have it.
COMPARED = {
    "failures": ("failed", "failures"),
    "requests_per_second": ("request_throughput", "requests_per_second"),
    "prompt_tokens": ("total_input_tokens", "prompt_tokens"),
    "ttft_p50_ms": ("median_ttft_ms", "ttft_ms.p50"),
    "ttft_p95_ms": ("p95_ttft_ms", "ttft_ms.p95"),
    "tpot_p50_ms": ("median_tpot_ms", "tpot_ms.p50"),
}


def write_sharegpt(path: Path, requests: Sequence[Request]) -> None:
    """Requests as ``bench serve --dataset-name sharegpt`` reads them: LLaVA's form with a ``video`` path."""
    turns = [
        {
            "id": str(number),
            "video": request.url.removeprefix("file://"),
            "conversations": [{"from": "human", "value": request.text}, {"from": "gpt", "value": "An answer."}],
        }
        for number, request in enumerate(requests)
    ]
    path.write_text(json.dumps(turns, indent=1))


def bench_command(
    url: str, tokenizer: str, dataset: Path, users: int, count: int, max_tokens: int, ratio: float | None
) -> list[str]:
    """The ``bench serve`` call; its result file goes to ``bench.json`` beside the dataset."""
    command = [sys.executable, str(VLLM_CLI), "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions"]
    command += ["--model", tokenizer, "--served-model-name", SERVED_NAME, "--tokenizer", tokenizer]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle"]
    command += ["--num-prompts", str(count), "--max-concurrency", str(users)]
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
        raise RuntimeError(f"bench serve ended with {code} (log: {log}):\n{tail(log)}")
    return json.loads((folder / "bench.json").read_text())


def crosscheck(
    url: str, tokenizer: str, requests: Sequence[Request], users: int, folder: Path, ours: dict[str, Any]
) -> list[dict[str, Any]]:
    """What both clients measured, a row each; ``ours`` is the aggregate of the same requests, all of one ratio.

    Raises:
        SystemExit: one of them had a failure, or saw another number of prompt tokens.
    """
    folder.mkdir()
    dataset, first = folder / "sharegpt.json", requests[0]
    write_sharegpt(dataset, requests)
    command = bench_command(url, tokenizer, dataset, users, len(requests), first.max_tokens, first.ratio)
    theirs = run_bench(command, folder)
    ours = {**ours, **{f"{name}.{p}": value for name in ("ttft_ms", "tpot_ms") for p, value in ours[name].items()}}
    exact = sum(request.counts.prompt(request.ratio) for request in requests if request.counts)
    rows = [
        {"client": client, **{key: result[names[place]] for key, names in COMPARED.items()}}
        for place, (client, result) in enumerate(((BENCH_SERVE, theirs), ("locust", ours)))
    ]
    for row in rows:
        if row["failures"] or row["prompt_tokens"] != exact:
            sys.exit(f"{row}, but no failure and {exact} prompt tokens are right")
    return rows
