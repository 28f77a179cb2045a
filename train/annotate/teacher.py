"""A teacher behind an OpenAI-compatible endpoint: one video in, one answer out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from score_vllm.client import SEND, Client, Reply, RequestFailed, chat_body, data_url, user_message, video_url
from score_vllm.train.data.clips import FOLDER_FPS, ClipReader, encode_mp4
from score_vllm.train.data.sample import BrokenSampleError

# Errors that every request will meet: a wrong key, a wrong URL or model.
FATAL_STATUSES = frozenset({401, 403, 404, 405})


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
        if not self.model:
            raise ValueError("model must be the name of a model at the endpoint, got ''")
        if self.send not in SEND:
            raise ValueError(f"send must be one of {list(SEND)}, got {self.send!r}")
        if self.retention_ratio is not None and not 0 < self.retention_ratio <= 1:
            raise ValueError(f"retention_ratio must be in (0, 1], got {self.retention_ratio!r}")
        for name, least in (("max_tokens", 1), ("temperature", 0), ("max_bytes", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)!r}")
        self.client()  # checks the rest

    def client(self) -> Client:
        """A new client of the endpoint."""
        return Client(self.base_url, self.api_key, timeout=self.timeout, retries=self.retries, first_wait=self.backoff)


class Teacher:
    """Asks the endpoint; use as an asynchronous context manager."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self._client = config.client()

    async def __aenter__(self) -> Teacher:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.__aexit__(*exc)

    async def ask(self, video: Path, prompt: str) -> Reply:
        """Ask one question about one video.

        Args:
            video: file, or folder of frames (which is sent as an mp4).
            prompt: the question.

        Raises:
            AnswerError: the video cannot be read, or the endpoint refuses it.
            NoAnswerError: every try failed.
            TeacherError: the endpoint refuses everything.
        """
        config = self.config
        body = chat_body(
            config.model,
            [user_message(await asyncio.to_thread(self._video_url, video), prompt)],
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            retention_ratio=config.retention_ratio,
        )
        try:
            return await self._client.chat(body)
        except RequestFailed as error:
            if error.status in FATAL_STATUSES:
                raise TeacherError(f"{config.base_url}: {error}") from error
            raise (NoAnswerError if error.exhausted else AnswerError)(str(error)) from error

    def _video_url(self, video: Path) -> str:
        try:
            if video.is_dir():
                clip = ClipReader(fps=FOLDER_FPS).read(video, video.name)
                return data_url(encode_mp4(clip.frames, clip.fps))
            size = video.stat().st_size
            if self.config.send == "base64" and size > self.config.max_bytes:
                raise AnswerError(f"{video} has {size} bytes, more than max_bytes = {self.config.max_bytes}")
            return video_url(video, self.config.send)
        except BrokenSampleError as error:
            raise AnswerError(str(error)) from error
        except OSError as error:
            raise AnswerError(f"cannot read {video}: {error.strerror or error}") from error
