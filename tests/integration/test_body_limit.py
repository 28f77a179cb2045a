"""The largest body of a request: refused by what it says, or as soon as it is too large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from score_vllm.server.body_limit import MIB, BodyLimit
from score_vllm.server.endpoints import http_error_response

JSON = {"content-type": "application/json"}


class ReadsFirst:
    """A middleware below the limit that reads the body of ``/early``, as RefuseElsewhere does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while scope["type"] == "http" and scope["path"] == "/early":
            if not (await receive()).get("more_body"):
                break
        await self.app(scope, receive, send)


class Served:
    """An app with a limit of one MiB; ``parsed`` are the bodies that reached a route."""

    def __init__(self) -> None:
        self.app, self.parsed = FastAPI(), []

        async def echo(body: dict[str, Any]) -> int:
            self.parsed.append(body)
            return len(body["text"])

        for path in ("/echo", "/early"):
            self.app.add_api_route(path, echo, methods=["POST"])
        self.app.add_exception_handler(HTTPException, http_error_response)  # type: ignore[arg-type]
        self.app.add_middleware(ReadsFirst)
        self.app.add_middleware(BodyLimit)
        self.app.state.score_body_limit = MIB

    def post(self, path: str, size: int, *, says: bool) -> httpx.Response:
        """A body of ``size`` bytes, which says how large it is or comes in chunks."""
        body = b'{"text": "' + b"x" * (size - 12) + b'"}'
        assert len(body) == size

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, size, 100_000):
                yield body[start : start + 100_000]

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
                return await client.post(path, content=body if says else chunks(), headers=JSON)

        return asyncio.run(send())


@pytest.mark.parametrize("says", [True, False], ids=["says its size", "in chunks"])
def test_larger_bodies_are_refused_and_not_parsed(says: bool) -> None:
    served = Served()
    assert served.post("/echo", MIB, says=says).json() == MIB - 12
    assert len(served.parsed) == 1
    for path in ("/echo", "/early"):
        refused = served.post(path, MIB + 1, says=says)
        assert refused.status_code == 413
        error = refused.json()["error"]
        assert error["code"] == 413
        assert "larger than 1048576 bytes" in error["message"]
        assert "--max-body-mib 1" in error["message"]
    assert len(served.parsed) == 1


def test_there_is_no_limit_before_the_server_has_started() -> None:
    served = Served()
    del served.app.state.score_body_limit
    assert served.post("/echo", 2 * MIB, says=True).status_code == 200
