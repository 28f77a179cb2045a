"""Questions to an OpenAI-compatible endpoint: one video part each, the ratio at the top level of the body."""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

SEND = ("file", "base64", "url")
RETRIED = {408, 425, 429, 500, 502, 503, 504}
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0


class RequestFailed(Exception):
    """No answer came: the text says why. A failed request is never scored."""


@dataclass(frozen=True)
class Reply:
    """One answer, with what the server says it cost."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    report: dict[str, Any] | None  # score-serve's ``score`` field, where there is one


@dataclass(frozen=True)
class Videos:
    """How videos reach the server.

    Attributes:
        root: folder of the videos here.
        send: "file" (a file:// URL that the server opens), "base64" (inside the request) or "url".
        prefix: for "url" what replaces ``root``, a URL; for "file" the same folder as the server sees it, or None.
    """

    root: Path
    send: str
    prefix: str | None = None

    def url(self, path: Path) -> str:
        """The address of one video; reads the whole file for "base64".

        Raises:
            OSError: the file cannot be read.
        """
        if self.send == "base64":
            kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        relative = quote(path.relative_to(self.root).as_posix())
        if self.send == "url":
            return f"{(self.prefix or '').rstrip('/')}/{relative}"
        if self.prefix is not None:
            return f"file://{quote(self.prefix.rstrip('/'))}/{relative}"
        return path.resolve().as_uri()


def request_body(
    model: str, system: str | None, text: str, video_url: str, ratio: float | None, method: str | None, max_tokens: int
) -> dict[str, Any]:
    """A chat request about one video: greedy, the video first; ``None`` leaves a field to the server's default."""
    part = {"type": "video_url", "video_url": {"url": video_url}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    if ratio is not None:
        body["retention_ratio"] = ratio
    if method is not None:
        body["retention_method"] = method
    return body


class Client:
    """An async client with a limit on requests in flight, retries with growing waits, and a time limit.

    Args:
        base_url: the API's root, such as http://127.0.0.1:8000/v1.
        api_key: sent as a bearer token; None sends none.
        concurrency: most requests in flight.
        retries: how often one request is repeated after a 408, 425, 429, 5xx, a broken connection or a timeout.
        timeout: seconds for one attempt, the upload included.
    """

    def __init__(self, base_url: str, api_key: str | None, concurrency: int, retries: int, timeout: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.retries = retries
        self._slots = asyncio.Semaphore(concurrency)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=timeout))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def only_model(self) -> str:
        """The name of the one model that the endpoint serves.

        Raises:
            RequestFailed: no answer, or not exactly one model.
        """
        answer = await self._call("GET", "/models", None)
        entries = answer.get("data") if isinstance(answer, dict) else None
        names = [entry.get("id") for entry in entries or [] if isinstance(entry, dict)]
        if len(names) != 1:
            raise RequestFailed(f"{self.base_url}/models lists {names}; choose one with --model")
        return str(names[0])

    async def ask(self, body: dict[str, Any], video: tuple[Videos, Path] | None = None) -> Reply:
        """One chat completion; ``video`` fills in the address of the body's video part once a slot is free.

        Raises:
            RequestFailed: refused, or still failing after all retries, or not a chat completion.
        """
        async with self._slots:
            if video is not None:
                videos, path = video
                try:
                    # Read here and not earlier: only as many videos as slots are in memory.
                    url = await asyncio.to_thread(videos.url, path)
                except OSError as error:
                    raise RequestFailed(f"the video cannot be read: {error}") from error
                user = body["messages"][-1]
                part = {"type": "video_url", "video_url": {"url": url}}
                body = {**body, "messages": [*body["messages"][:-1], {**user, "content": [part, *user["content"][1:]]}]}
            answer = await self._call("POST", "/chat/completions", body)
        return _reply(answer)

    async def _call(self, verb: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        for attempt in range(self.retries + 1):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
            try:
                async with self._session.request(verb, self.base_url + path, data=data, headers=headers) as response:
                    content = await response.read()
                    if response.status == 200:
                        return _parse(content)
                    problem = f"HTTP {response.status}: {_message(content)}"
                    if response.status not in RETRIED:
                        raise RequestFailed(problem)
                    asked = response.headers.get("Retry-After", "")
                    if asked.isdigit():
                        wait = min(LONGEST_WAIT, float(asked))
            except TimeoutError:
                problem = f"no answer within {self._session.timeout.total:g} s"
            except aiohttp.InvalidURL as error:
                raise RequestFailed(f"{self.base_url + path!r} is not a URL") from error
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                await asyncio.sleep(wait)
        tries = f" (after {self.retries + 1} tries)" if self.retries else ""
        raise RequestFailed(problem + tries)


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise RequestFailed(f"the answer is not JSON: {content[:200]!r}") from error


def _message(content: bytes) -> str:
    """The sentence inside an error answer, or its first bytes."""
    try:
        parsed = json.loads(content)
        error = parsed.get("error", parsed)
        text = error if isinstance(error, str) else error.get("message", parsed.get("detail", ""))
    except (ValueError, AttributeError):
        text = ""
    return " ".join((str(text) or content[:300].decode(errors="replace")).split())[:600]


def _reply(answer: Any) -> Reply:
    try:
        (choice,) = answer["choices"]
        text, finish = choice["message"]["content"] or "", choice.get("finish_reason")
        usage = answer.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError("content is not text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestFailed(f"not a chat completion with one choice: {json.dumps(answer)[:300]}") from error
    return Reply(text, usage.get("prompt_tokens"), usage.get("completion_tokens"), finish, answer.get("score"))
