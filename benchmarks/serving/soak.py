"""Soak and faults: does a server keep every good answer right while everything around it goes wrong?

    python -m benchmarks.serving.soak             # some 10 minutes on two cores
    python -m benchmarks.serving.soak --quick

Mixed requests, 32 at once, to one score-serve of the demo model with small caches: good ones whose tokens are known,
mutated clips of every container (soak_media.py), wrong fields, two videos, text, streams, clients that vanish, bodies
that end half-way; meanwhile soak_faults.py kills decoding processes, removes the temporary folder, and takes file
descriptors and memory away. A good request may be told to come again (503 with Retry-After), and must then give exactly
the tokens that it gave on the idle server; every other answer must be a refusal. Afterwards the server is as large as
before, and schemathesis tries the whole OpenAPI surface. Ends with 1 where any of this is not so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from benchmarks.harness import at_least, default_output, script_parser
from benchmarks.report import publish
from benchmarks.serving.model import resolve_model
from benchmarks.serving.server import SERVED_NAME, ServerOptions, running
from benchmarks.serving.soak_faults import Faults
from benchmarks.serving.soak_media import good_clips, mutated_clips
from benchmarks.serving.soak_schema import OURS, try_schema
from score_vllm.client import chat_body, data_url, user_message

# Parts of the mixture, out of 100.
MIX = {"good": 25, "stream": 10, "two videos": 8, "text": 7, "mutated": 25, "wrong": 10, "vanish": 10, "half": 5}
RATIOS = (0.1, 0.25, 1.0)
QUESTIONS = ("What happens?", "How many things are there?")
WRONG: tuple[dict[str, Any], ...] = (
    {"retention_ratio": 0},
    {"retention_ratio": 1.5},
    {"retention_ratio": "a tenth"},
    {"retention_ratio": [0.1, 0.2]},
    {"retention_method": "nobody's"},
    {"max_tokens": -1},
    {"temperature": "warm"},
    {"model": "another"},
    {"messages": []},
)
REFUSALS = frozenset({*range(400, 500), 503})
# Between them the server is measured at rest, and every good question is asked alone.
PARTS = 4
MAX_TOKENS = 16
LONG = 256
# Small, so that they evict all the time.
CACHES = ("--mm-processor-cache-gb", "0.02", "--enable-prefix-caching")
# Seconds for which a good request comes again after a 503.
PATIENCE = 120.0


@dataclass(frozen=True)
class Question:
    """A good request: names of clips, text and ratio."""

    clips: tuple[Path, ...]
    text: str
    ratio: float | None

    def body(self, by_path: bool, **fields: Any) -> dict[str, Any]:
        """What is sent."""
        urls = [clip.as_uri() if by_path else data_url(clip.read_bytes()) for clip in self.clips]
        message = user_message("", self.text)
        message["content"][:1] = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
        fields = {"model": SERVED_NAME, "messages": [message], "retention_ratio": self.ratio} | fields
        fields = {"max_tokens": MAX_TOKENS, "return_token_ids": True} | fields
        return chat_body(fields.pop("model"), fields.pop("messages"), **fields)


def questions_of(clips: list[Path]) -> dict[str, list[Question]]:
    """Every good request, by kind."""
    grid = [(text, ratio) for text in QUESTIONS for ratio in RATIOS]
    one = [Question((clip,), *rest) for clip in clips for rest in grid]
    two = [Question(pair, *rest) for pair in itertools.pairwise(clips) for rest in grid]
    return {"good": one, "stream": one, "two videos": two, "text": [Question((), text, None) for text in QUESTIONS]}


def tokens_of(response: httpx.Response) -> list[int]:
    """Of a whole answer, or of a stream's chunks.

    Raises:
        ValueError: the stream did not end as it should.
    """
    if not response.headers["content-type"].startswith("text/event-stream"):
        return list(response.json()["choices"][0]["token_ids"])
    *chunks, last = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    if last != "[DONE]":
        raise ValueError(f"the stream ended with {last[:300]}")
    return [i for chunk in chunks for choice in json.loads(chunk)["choices"] for i in choice.get("token_ids") or ()]


class Campaign:
    """The clients: what is sent, and what must come back.

    Attributes:
        statuses: what came, by kind of request.
        faults: answers that are not what they must be, in words.
    """

    def __init__(self, url: str, clips: list[Path], mutated: list[Path]) -> None:
        self.statuses: dict[str, Counter[str]] = {kind: Counter() for kind in MIX}
        self.faults: list[str] = []
        self._url, self._mutants, self._random = (
            f"{url}/v1/chat/completions",
            itertools.cycle(mutated),
            random.Random(0),
        )
        self._questions, self._expected = questions_of(clips), dict[Question, list[int]]()

    async def ask_everything(self, http: httpx.AsyncClient) -> int:
        """Each good question once, alone: at the first time this says what is right."""
        different = {question: kind for kind, questions in self._questions.items() for question in questions}
        for question in tqdm(different, desc="one after the other", unit="request"):
            response = await http.post(self._url, json=question.body(by_path=True))
            self._compare(question, response, "alone")
        return len(different)

    def _compare(self, question: Question, response: httpx.Response, kind: str) -> None:
        if response.status_code != 200:
            self.faults.append(f"{kind}: status {response.status_code}: {response.text[:300]}")
        elif (tokens := tokens_of(response)) != (expected := self._expected.setdefault(question, tokens)):
            self.faults.append(f"{kind}: {question} gave {tokens} instead of {expected}")

    async def ask(self, http: httpx.AsyncClient, kind: str) -> None:
        """One request of a kind."""
        try:
            if kind in self._questions:
                await self._good(http, kind)
            elif kind in ("mutated", "wrong"):
                await self._bad(http, kind)
            else:
                await self._leave(kind)
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            self.statuses[kind][type(error).__name__] += 1
            self.faults.append(f"{kind}: {error!r}")

    async def _good(self, http: httpx.AsyncClient, kind: str) -> None:
        question = self._random.choice(self._questions[kind])
        body = question.body(self._random.random() < 0.5, stream=kind == "stream")
        end = time.monotonic() + PATIENCE
        while True:
            response = await http.post(self._url, json=body)
            self.statuses[kind][str(response.status_code)] += 1
            if response.status_code != 503 or "retry-after" not in response.headers or time.monotonic() > end:
                return self._compare(question, response, kind)
            await asyncio.sleep(float(response.headers["retry-after"]))

    async def _bad(self, http: httpx.AsyncClient, kind: str) -> None:
        question = self._questions["good"][0]
        fields = self._random.choice(WRONG) if kind == "wrong" else {}
        name = question.clips[0]
        if kind == "mutated":
            name = next(self._mutants)
            question = Question((name,), question.text, question.ratio)
        response = await http.post(self._url, json=question.body(True, **fields))
        self.statuses[kind][str(response.status_code)] += 1
        # A file may be damaged where nobody looks.
        if response.status_code not in REFUSALS and (kind, response.status_code) != ("mutated", 200):
            self.faults.append(f"{kind}, {fields or name.name}: status {response.status_code}: {response.text[:300]}")

    async def _leave(self, kind: str) -> None:
        """A client that goes away: while it waits, in its answer, or in the middle of its own body."""
        question = self._random.choice(self._questions["good"])
        body = json.dumps(question.body(True, stream=True, max_tokens=LONG)).encode()
        url = httpx.URL(self._url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body if kind == "vanish" else body[: len(body) // 2])
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(reader.read(self._random.choice((1, 4000))), self._random.uniform(0.05, 3))
        writer.transport.abort()
        self.statuses[kind]["left"] += 1

    async def mixed(self, http: httpx.AsyncClient, count: int, at_once: int, label: str) -> None:
        """The mixture, shuffled."""
        kinds = [kind for kind, share in MIX.items() for _ in range(-(-count * share // 100))]
        self._random.shuffle(kinds)
        todo, bar = iter(kinds), tqdm(total=len(kinds), desc=label, unit="request")

        async def client() -> None:
            for kind in todo:
                await self.ask(http, kind)
                bar.update()

        with bar:
            await asyncio.gather(*(client() for _ in range(at_once)))


def usage(pid: int) -> dict[str, int]:
    """Processes, resident bytes, descriptors and threads of a server, once nothing is running or waiting."""
    time.sleep(5)
    root = psutil.Process(pid)
    found = {"processes": 0, "bytes": 0, "descriptors": 0, "threads": 0}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            size, descriptors, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
            for name, value in zip(found, (1, size, descriptors, threads), strict=True):
                found[name] += value
    return found


async def soak(url: str, pid: int, campaign: Campaign, args: Any) -> tuple[list[dict[str, Any]], Counter[str], int]:
    """Everything but the schema; the server's sizes by moment, the faults brought about, the good questions."""
    sizes = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        different = await campaign.ask_everything(http)
        await campaign.mixed(http, args.requests // 4, args.at_once, "warm-up, no faults")
        sizes.append({"moment": "after the warm-up", **usage(pid)})
        counts = Counter[str]()
        for part in range(1, PARTS + 1):
            moment = f"after {part * args.requests // PARTS:,} more, with faults"
            with Faults(pid, args.fault_every) as faults:
                await campaign.mixed(http, args.requests // PARTS, args.at_once, moment)
            counts += faults.counts
            await campaign.ask_everything(http)
            sizes.append({"moment": moment, **usage(pid)})
    return sizes, counts, different


def main() -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--requests",
        type=at_least(8),
        default=2000,
        help="with faults; a quarter more as warm-up (default: %(default)s)",
    )
    add("--at-once", type=at_least(1), default=32, help="clients (default: %(default)s)")
    add("--mutations", type=at_least(1), default=330, help="distinct damaged files (default: %(default)s)")
    add("--fault-every", type=at_least(1), default=4, metavar="S", help="seconds between faults (default: %(default)s)")
    add("--examples", type=at_least(1), default=50, help="of schemathesis per operation (default: %(default)s)")
    add("--output", type=Path, default=None, help="results file")
    add("--quick", action="store_true", help="few requests: does it all work?")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.at_once, args.mutations, args.examples = 80, 8, 30, 2
    folder = Path(tempfile.mkdtemp(prefix="score-soak-"))
    (folder / "media").mkdir()
    clips = good_clips(folder / "media", 6)
    mutated = mutated_clips(folder / "media", args.mutations)
    model = resolve_model("demo", None)
    extra = [*CACHES, "--limit-mm-per-prompt", json.dumps({"image": 0, "video": 2})]
    # Schemathesis asks for thousands of tokens and choices, which vLLM would generate.
    extra += ["--override-generation-config", json.dumps({"max_new_tokens": LONG})]
    os.environ["VLLM_MAX_N_SEQUENCES"] = "4"
    options = ServerOptions(model, "float32", 8192, 128, folder / "media", 1, extra)
    print(f"logs in {folder}")
    with running("score", options, folder) as server:
        campaign = Campaign(server.url, clips, mutated)
        sizes, faults, different = asyncio.run(soak(server.url, server.process.pid, campaign, args))
        schema = try_schema(server.url, args.examples, folder / "schemathesis.log")
    for fault in campaign.faults[:20]:
        print(f"FAULT {fault}")
    rows = [
        {"kind": kind, "requests": sum(counts.values()), "statuses": dict(sorted(counts.items()))}
        for kind, counts in campaign.statuses.items()
    ]
    facts = {"arguments": {name: str(value) for name, value in vars(args).items() if name != "output"}}
    facts |= {"model": model.description, "sizes": sizes, "faults": dict(faults), "schema_test": schema}
    facts |= {"wrong_answers": campaign.faults, "different_questions": different}
    publish("soak", args.output or default_output("soak", "demo", args.quick), rows, **facts)
    ours = sorted(OURS.intersection(schema["failed"]))
    if campaign.faults or ours:
        sys.exit(f"{len(campaign.faults)} wrong answers; schemathesis found faults of {ours}")


if __name__ == "__main__":
    main()
