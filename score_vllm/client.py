"""The one HTTP client: chat completions about videos from any OpenAI-compatible server, with retries.

Used by annotation, lmms-eval and the benchmarks; needs httpx and nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

SEND = ("file", "base64")
# Another try can cure these: timeouts, rate limits, a server that is overloaded or restarts.
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0
# Containers that servers tell apart; everything else is sent as mp4.
_SUBTYPES = {".mkv": "x-matroska", ".webm": "webm", ".mov": "quicktime", ".avi": "x-msvideo"}


class RequestFailed(Exception):
    """No answer came; the text says why.

    Attributes:
        status: HTTP status of a refusal; None where no usable response came.
        exhausted: every try failed for a reason that another try might have cured.
    """

    def __init__(self, message: str, status: int | None = None, exhausted: bool = False) -> None:
        super().__init__(message)
        self.status, self.exhausted = status, exhausted


class NotCompressed(RequestFailed):
    """The server answers, and does not do what a ratio or method asks for."""


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: None where the message has no content; parts of a list are joined.
        score: score-serve's report, where there is one.
    """

    text: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    score: dict[str, Any] | None


class Endpoint(Protocol):
    """What answers chat requests: :class:`Client`, or a model in this process."""

    base_url: str

    async def models(self) -> list[str]: ...

    async def chat(self, body: dict[str, Any]) -> Reply: ...


def data_url(data: bytes, suffix: str = ".mp4") -> str:
    """A video's bytes as a URL."""
    return f"data:video/{_SUBTYPES.get(suffix.lower(), 'mp4')};base64,{base64.b64encode(data).decode()}"


def video_url(path: Path, send: str) -> str:
    """How a video file is named in a request: "file" (the server opens the path) or "base64" (its bytes).

    Raises:
        OSError: the file cannot be read.
        ValueError: another ``send``.
    """
    if send not in SEND:
        raise ValueError(f"send must be 'file' or 'base64', got {send!r}")
    return path.resolve().as_uri() if send == "file" else data_url(path.read_bytes(), path.suffix)


def user_message(url: str, text: str) -> dict[str, Any]:
    """One user turn: a video, then text."""
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def chat_body(
    model: str,
    messages: list[dict[str, Any]],
    *,
    max_tokens: int,
    temperature: float = 0,
    retention_ratio: float | None = None,
    retention_method: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A request's body; ``None`` leaves a field out, to the server's default."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    fields |= {"retention_ratio": retention_ratio, "retention_method": retention_method}
    return body | {name: value for name, value in fields.items() if value is not None}


class Client:
    """An async client of one server; use as a context manager, inside one event loop.

    Args:
        base_url: the API's root, such as http://127.0.0.1:8000/v1.
        api_key: sent as a bearer token; empty or None sends none.
        timeout: seconds for one try, upload included, > 0.
        retries: tries after the first, >= 0, where :data:`RETRIED`, a lost connection or a timeout ended one.
        first_wait: seconds before the first retry, > 0; doubles each time, to at most 60. ``Retry-After`` may
            lengthen it.

    Raises:
        ValueError: an argument out of range, or no URL.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 0,
        first_wait: float = 1.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if retries < 0:
            raise ValueError(f"retries must be >= 0, got {retries!r}")
        for name, value in (("timeout", timeout), ("first_wait", first_wait)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0 seconds, got {value!r}")
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url {base_url!r} is no URL: {error}") from error
        self.base_url, self.timeout, self.retries, self.first_wait = base_url.rstrip("/"), timeout, retries, first_wait
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> Client:
        self.http = httpx.AsyncClient(
            headers=self._headers,
            limits=httpx.Limits(max_connections=None),
            timeout=None,  # a time limit of ours covers each whole try
            verify=self.base_url.startswith("https"),  # loading certificates takes a tenth of a second
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def models(self) -> list[str]:
        """Names of the served models.

        Raises:
            RequestFailed: no answer.
        """
        answer = await self._call("GET", "/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        return [str(entry.get("id")) for entry in entries or [] if isinstance(entry, dict)]

    async def chat(self, body: dict[str, Any]) -> Reply:
        """One chat completion.

        Raises:
            RequestFailed: refused, still failing after all retries, or not a chat completion.
        """
        answer = await self._call("POST", "/chat/completions", body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["message"].get("content")
            if isinstance(text, list):  # some servers answer in parts
                text = "".join(part["text"] for part in text if part.get("type") == "text")
            if not isinstance(text, str | None):
                raise TypeError("content is not text")
            tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
            return Reply(text, choice.get("finish_reason"), *tokens, answer.get("score"))
        except (LookupError, TypeError, AttributeError) as error:
            raise RequestFailed(f"not a chat completion: {json.dumps(answer)[:300]}") from error

    async def _call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1)
            try:
                async with asyncio.timeout(self.timeout):
                    response = await self.http.request(verb, self.base_url + path, content=content, headers=headers)
            except TimeoutError:
                problem, status = f"{self.base_url}: no answer within {self.timeout:g} s", None
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem, status = f"{self.base_url}: {type(error).__name__}: {error}".removesuffix(": "), None
            else:
                if response.status_code == 200:
                    return _json(response)
                problem, status = f"HTTP {response.status_code}: {error_text(response)}", response.status_code
                if status not in RETRIED:
                    raise RequestFailed(problem, status)
                wait = max(wait, _retry_after(response))
            if attempt < self.retries:
                await asyncio.sleep(wait)
        tries = f" (after {self.retries + 1} tries)" if self.retries else ""
        raise RequestFailed(problem + tries, status, exhausted=True)


async def compressed_lengths(client: Endpoint, body: dict[str, Any], ratios: Sequence[float]) -> dict[float, int]:
    """Prompt tokens of a request at each ratio, all below 1, and at 1; they must follow the ratio.

    A stock server accepts ``retention_ratio`` as an unknown field and ignores it. Where ratio 1 does not fit the model,
    half of the smallest ratio is compared.

    Raises:
        NotCompressed: the lengths do not follow the ratio, usage is not reported, or another method answered.
        RequestFailed: a request failed.
    """

    async def length(ratio: float) -> int:
        reply = await client.chat({**body, "retention_ratio": ratio, "max_tokens": 1})
        if reply.prompt_tokens is None:
            raise NotCompressed("the server reports no usage.prompt_tokens, so compression cannot be verified")
        method = body.get("retention_method")
        if method is not None and (said := (reply.score or {}).get("method", method)) != method:
            raise NotCompressed(f"retention_method {method!r} was asked for, and the server used {said!r}")
        return reply.prompt_tokens

    lengths = {ratio: await length(ratio) for ratio in ratios}
    try:
        other = 1.0
        lengths[other] = await length(other)
    except NotCompressed:
        raise
    except RequestFailed:
        other = min(ratios) / 2
        lengths[other] = await length(other)
    if any((lengths[ratio] - lengths[other]) * (ratio - other) <= 0 for ratio in ratios):
        seen = ", ".join(f"{lengths[ratio]} prompt tokens at ratio {ratio:g}" for ratio in sorted(lengths))
        raise NotCompressed(
            f"the server ignores retention_ratio: {seen}; start score-serve, or leave the ratio to the server"
        )
    return lengths


def error_text(response: httpx.Response) -> str:
    """The sentence inside an error response, or its first bytes."""
    try:
        found = response.json()
        error = found.get("error", found)
        text = error if isinstance(error, str) else error.get("message", error.get("detail", error))
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:600]


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise RequestFailed(f"not a chat completion: {response.text[:300]!r}") from error


def _retry_after(response: httpx.Response) -> float:
    asked = response.headers.get("retry-after", "")
    return min(LONGEST_WAIT, float(asked)) if asked.isdecimal() else 0.0  # a date: the usual wait will do
