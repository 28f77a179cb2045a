"""Streamed chat completions about videos: requests with exact counts, token times, and what is wrong with an answer.

Tokens are counted by ``usage.completion_tokens`` of each chunk (``continuous_usage_stats``), not by pieces of text: a
token may have no text yet (half a UTF-8 character), and a slow reader gets several tokens in one chunk.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from score_vllm import num_retained_tokens
from score_vllm.client import Client, RequestFailed, chat_body, error_text, user_message


@dataclass(frozen=True)
class Counts:
    """Tokens of a prompt with one video: visual before compression, and text."""

    visual: int
    text: int

    def kept(self, ratio: float | None) -> int:
        """Visual tokens at a ratio; None is vanilla."""
        return self.visual if ratio is None else num_retained_tokens(self.visual, ratio)

    def prompt(self, ratio: float | None) -> int:
        """All tokens at a ratio."""
        return self.kept(ratio) + self.text


@dataclass(frozen=True)
class Request:
    """One request, and what its answer must report.

    Attributes:
        url: of the video.
        text: the question.
        max_tokens: exactly this many are generated.
        ratio: retention ratio; None leaves the field out (a vanilla server would ignore it in silence).
        counts: None where they are not known yet.
        window: seconds of the video to read; None is all.
    """

    url: str
    text: str
    max_tokens: int
    ratio: float | None = None
    counts: Counts | None = None
    window: tuple[float, float] | None = None

    def body(self, model: str) -> dict[str, Any]:
        """What is sent."""
        return chat_body(
            model,
            [user_message(self.url, self.text)],
            max_tokens=self.max_tokens,
            retention_ratio=self.ratio,
            video_start=self.window and self.window[0],
            video_end=self.window and self.window[1],
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            return_token_ids=True,
        )


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """Requests as JSON, for the locustfile."""
    path.write_text(json.dumps([asdict(request) for request in requests]))


def read_requests(path: Path) -> list[Request]:
    """What :func:`write_requests` wrote."""
    found = json.loads(path.read_text())
    for entry in found:
        entry["counts"] = entry["counts"] and Counts(**entry["counts"])
        entry["window"] = entry["window"] and tuple(entry["window"])
    return [Request(**entry) for entry in found]


class EventParser:
    """Splits a byte stream into the payloads of its ``data:`` lines, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Payloads completed by these bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip().decode() for line in lines if line.startswith(b"data:")]


@dataclass
class Answer:
    """One streamed answer as it arrives.

    Attributes:
        sent: when the request was sent, in seconds of the monotonic clock.
        arrivals: ``(time, tokens)`` of every chunk that brought new tokens.
        text: the answer so far.
        ids: its token ids.
        usage: the last ``usage`` object seen.
        score: the ``score`` object, where the server compresses.
        error: of an error event, a refusal or a lost connection.
        done: ``[DONE]`` was seen.
        end: when the answer was complete or had failed.
    """

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] | None = None
    error: str | None = None
    done: bool = False
    end: float = 0.0
    _parser: EventParser = field(default_factory=EventParser, repr=False)

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at ``now``."""
        for payload in self._parser.feed(data):
            if payload == "[DONE]":
                self.done = True
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                self.error = f"error event: {json.dumps(chunk['error'])}"
                continue
            before = self.usage.get("completion_tokens", 0)
            self.usage = chunk.get("usage") or self.usage
            self.score = chunk.get("score", self.score)
            for choice in chunk.get("choices", ()):
                self.text += choice["delta"].get("content") or ""
                self.ids += choice.get("token_ids") or ()
            new = self.usage.get("completion_tokens", 0) - before
            if new > 0:
                self.arrivals.append((now, new))

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token.

        Raises:
            ValueError: no token came.
        """
        if not self.arrivals:
            raise ValueError("no token arrived")
        return self.arrivals[0][0] - self.sent

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens whose both ends lie in [begin, end].

        A chunk with several tokens shares its gap out among them. Tokens of the first chunk have no gap.
        """
        found = []
        for (earlier, _), (later, count) in itertools.pairwise(self.arrivals):
            if begin <= earlier and later <= end:
                found += [(later - earlier) / count] * count
        return found

    def problem(self, request: Request) -> str | None:
        """What is wrong with the finished answer, or None."""
        if self.error is not None:
            return self.error
        if not self.done:
            return "the stream ended without [DONE]"
        if self.tokens != request.max_tokens:
            return f"{self.tokens} tokens came instead of {request.max_tokens}"
        if request.counts is None:
            return None
        prompt, kept = request.counts.prompt(request.ratio), request.counts.kept(request.ratio)
        if self.usage.get("prompt_tokens") != prompt:
            return f"the prompt had {self.usage.get('prompt_tokens')} tokens instead of {prompt}"
        reported = [video["retained_tokens"] for video in (self.score or {}).get("videos", ())]
        if request.ratio is not None and reported != [kept]:
            return f"the server reports {reported} retained tokens instead of [{kept}]"
        return None


async def stream(client: Client, model: str, request: Request) -> Answer:
    """Send one request and read its answer as it comes; a failure is in its ``error``."""
    content = json.dumps(request.body(model)).encode()
    headers = {"Content-Type": "application/json"}
    answer = Answer(time.monotonic())
    try:
        async with (
            asyncio.timeout(client.timeout),
            client.http.stream(
                "POST", f"{client.base_url}/chat/completions", content=content, headers=headers
            ) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                raise RequestFailed(f"status {response.status_code}: {error_text(response)}")
            async for data in response.aiter_raw():
                answer.feed(data, time.monotonic())
    except Exception as error:  # whatever broke, it is a failed request and not the end of the run
        answer.error = str(error) if isinstance(error, RequestFailed) else repr(error)
    answer.end = time.monotonic()
    return answer


def ask(url: str, model: str, requests: Sequence[Request]) -> list[Answer]:
    """Send requests at once, each over a connection of its own, and wait for all answers.

    Raises:
        SystemExit: one of them is not right.
    """

    async def ask_all() -> list[Answer]:
        async with Client(f"{url}/v1", timeout=600) as client:
            return await asyncio.gather(*(stream(client, model, request) for request in requests))

    answers = asyncio.run(ask_all())
    for request, answer in zip(requests, answers, strict=True):
        if wrong := answer.problem(request):
            sys.exit(f"a request to {url} failed: {wrong}")
    return answers
