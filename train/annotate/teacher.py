"""A teacher behind an OpenAI-compatible endpoint: one video in, one answer out, retries in between."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from score_vllm.train.data.clips import FOLDER_FPS, ClipReader, encode_mp4
from score_vllm.train.data.sample import BrokenSampleError

SEND = ("file", "base64")
# Errors that another try can cure: time-outs, rate limits, a server that is overloaded or restarts.
RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# Errors that every request will meet: a wrong key, a wrong URL or model.
FATAL_STATUSES = frozenset({401, 403, 404, 405})
_MIME = {".mkv": "x-matroska", ".webm": "webm", ".mov": "quicktime", ".avi": "x-msvideo"}
_LONGEST_WAIT = 60.0


class AnswerError(Exception):
    """No answer to this video; the message says why."""


class NoAnswerError(AnswerError):
    """Every try failed: the video, or the endpoint, is at fault."""


class TeacherError(Exception):
    """The endpoint answers nobody: wrong key, URL or model. No use in going on."""


@dataclass(frozen=True)
class TeacherConfig:
    """How the teacher is asked.

    Attributes:
        base_url: up to and including ``/v1``.
        model: name at the endpoint.
        api_key: sent as a bearer token; empty: none. Never written anywhere.
        send: ``file`` (a ``file://`` URL, for a server that sees the same disk) or ``base64``.
        max_tokens: of an answer, >= 1.
        temperature: >= 0.
        retention_ratio: in (0, 1], for score-vllm's own server; None: not sent.
        timeout: seconds for one try, > 0.
        retries: tries after the first, >= 0.
        backoff: seconds before the first retry, > 0; doubles each time, up to a minute.
        max_bytes: largest video that is sent as base64.

    Raises:
        ValueError: a value out of range.
    """

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    send: str = "base64"
    max_tokens: int = 512
    temperature: float = 0.0
    retention_ratio: float | None = None
    timeout: float = 300.0
    retries: int = 5
    backoff: float = 1.0
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")
        if not self.model:
            raise ValueError("model must be the name of a model at the endpoint, got ''")
        if self.send not in SEND:
            raise ValueError(f"send must be one of {list(SEND)}, got {self.send!r}")
        if self.retention_ratio is not None and not 0 < self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio must be in (0, 1], got {self.retention_ratio!r}")
        for name, least in (("max_tokens", 1), ("retries", 0), ("temperature", 0), ("max_bytes", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)!r}")
        for name in ("timeout", "backoff"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Answer:
    """What the teacher said: ``text`` as it came (a string, if all is well), and the API's ``finish_reason``."""

    text: Any
    finish_reason: str | None


class Teacher:
    """Asks the endpoint; use as an asynchronous context manager.

    Args:
        config: the endpoint.
        concurrency: connections held open, >= 1.

    Raises:
        ValueError: the URL cannot be parsed.
    """

    def __init__(self, config: TeacherConfig, concurrency: int) -> None:
        self.config = config
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        try:
            httpx.URL(self._url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url {config.base_url!r} is no URL: {error}") from error
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=config.timeout)

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, video: Path, prompt: str) -> Answer:
        """Ask one question about one video.

        Args:
            video: file, or folder of frames (which is sent as an mp4).
            prompt: the question.

        Returns:
            The answer, whatever it says.

        Raises:
            AnswerError: the video cannot be read, or the endpoint refuses it.
            NoAnswerError: every try failed.
            TeacherError: the endpoint refuses everything.
        """
        body = await asyncio.to_thread(self._body, video, prompt)
        last = ""
        for attempt in range(self.config.retries + 1):
            wait = min(self.config.backoff * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                response = await self._client.post(
                    self._url, content=body, headers={"Content-Type": "application/json"}
                )
            except (httpx.TransportError, httpx.DecodingError) as error:
                last = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code == 200:
                    return _answer(response)
                last = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code in FATAL_STATUSES:
                    raise TeacherError(f"{self._url}: {last}")
                if response.status_code not in RETRY_STATUSES:
                    raise AnswerError(last)
                wait = max(wait, _retry_after(response))
            if attempt < self.config.retries:
                await asyncio.sleep(wait)
        raise NoAnswerError(f"no answer after {self.config.retries + 1} tries; the last: {last}")

    def _body(self, video: Path, prompt: str) -> bytes:
        content = [
            {"type": "video_url", "video_url": {"url": self._video_url(video)}},
            {"type": "text", "text": prompt},
        ]
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }
        if self.config.retention_ratio is not None:
            body["retention_ratio"] = self.config.retention_ratio
        return json.dumps(body).encode()

    def _video_url(self, video: Path) -> str:
        try:
            if video.is_dir():
                clip = ClipReader(fps=FOLDER_FPS).read(video, video.name)
                return _data_url(encode_mp4(clip.frames, clip.fps), "mp4")
            size = video.stat().st_size
            if self.config.send == "file":
                return video.resolve().as_uri()
            if size > self.config.max_bytes:
                raise AnswerError(f"{video} has {size} bytes, more than max_bytes = {self.config.max_bytes}")
            return _data_url(video.read_bytes(), _MIME.get(video.suffix.lower(), "mp4"))
        except BrokenSampleError as error:
            raise AnswerError(str(error)) from error
        except OSError as error:
            raise AnswerError(f"cannot read {video}: {error.strerror or error}") from error


def _data_url(data: bytes, kind: str) -> str:
    return f"data:video/{kind};base64,{base64.b64encode(data).decode()}"


def _answer(response: httpx.Response) -> Answer:
    try:
        choice = response.json()["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AnswerError(f"the answer is no chat completion: {response.text[:200]!r}") from error
    if isinstance(text, list):  # parts, as some endpoints answer
        parts = [part.get("text") for part in text if isinstance(part, dict) and part.get("type") == "text"]
        text = "".join(part for part in parts if isinstance(part, str))
    return Answer("" if text is None else text, choice.get("finish_reason"))


def _message(response: httpx.Response) -> str:
    try:
        found = response.json()
        error = found.get("error", found)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", "0")), 0.0), _LONGEST_WAIT)
    except ValueError:  # a date: the usual wait will do
        return 0.0
