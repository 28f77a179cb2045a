"""Reading a streamed chat completion: server-sent events from bytes, token times, and what is wrong with an answer.

Times come from the caller, so that this file works the same under gevent, threads and tests. Tokens are counted by
``usage.completion_tokens`` of each chunk (``continuous_usage_stats``), not by pieces of text: a token may have no
text yet (half a UTF-8 character), and a slow reader gets several tokens in one chunk.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any


class EventParser:
    """Splits a byte stream into the payloads of its ``data:`` lines, wherever the network cut it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Payloads completed by these bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip().decode() for line in lines if line.startswith(b"data:")]


def chat_body(
    model: str, url: str, text: str, max_tokens: int, ratio: float | None, token_ids: bool = False
) -> dict[str, Any]:
    """A streaming chat request about one video.

    Args:
        model: served name.
        url: of the video.
        text: the question.
        max_tokens: exactly this many are generated.
        ratio: retention ratio; None leaves the field out (a vanilla server would ignore it in silence).
        token_ids: ask for the answer's token ids beside its text.
    """
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if ratio is not None:
        body["retention_ratio"] = ratio
    if token_ids:
        body["return_token_ids"] = True
    return body


@dataclass
class Answer:
    """One streamed answer as it arrives.

    Attributes:
        sent: when the request was sent, in seconds of the caller's clock.
        arrivals: ``(time, tokens)`` of every chunk that brought new tokens.
        text: the answer so far.
        ids: its token ids, where they were asked for.
        usage: the last ``usage`` object seen.
        score: the ``score`` object, where the server compresses.
        error: of an error event.
        done: ``[DONE]`` was seen.
    """

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] | None = None
    error: str | None = None
    done: bool = False
    _parser: EventParser = field(default_factory=EventParser, repr=False)

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at ``now``."""
        for payload in self._parser.feed(data):
            if payload == "[DONE]":
                self.done = True
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                self.error = json.dumps(chunk["error"])
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

    def inter_token(self) -> list[float]:
        """Seconds between tokens, one value per token after the first chunk's.

        A chunk with several tokens shares its gap out among them. Tokens of the first chunk have no gap.
        """
        gaps = []
        for (earlier, _), (later, count) in itertools.pairwise(self.arrivals):
            gaps += [(later - earlier) / count] * count
        return gaps

    def problem(self, max_tokens: int, prompt_tokens: int | None, retained: int | None) -> str | None:
        """What is wrong with the finished answer, or None.

        Args:
            max_tokens: tokens that had to come.
            prompt_tokens: what ``usage`` must say; None where it is not known yet.
            retained: tokens of the video that the ``score`` object must report; None on a vanilla server.
        """
        if self.error is not None:
            return f"error event: {self.error}"
        if not self.done:
            return "the stream ended without [DONE]"
        if self.tokens != max_tokens:
            return f"{self.tokens} tokens came instead of {max_tokens}"
        if prompt_tokens is not None and self.usage.get("prompt_tokens") != prompt_tokens:
            return f"the prompt had {self.usage.get('prompt_tokens')} tokens instead of {prompt_tokens}"
        if retained is not None:
            kept = [video["retained_tokens"] for video in (self.score or {}).get("videos", ())]
            if kept != [retained]:
                return f"the server reports {kept} retained tokens instead of [{retained}]"
        return None
