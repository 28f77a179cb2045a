"""The page at ``/playground``: static files, the demo's sample clip, and what this server lets a request choose.

The page holds no secret and is served to everybody who reaches the port. What it does goes through ``/v1``, which
``--api-key`` guards, and so do its settings. It asks no other machine for anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.responses import FileResponse, JSONResponse, Response

from score_vllm.demo import demo_clip

PAGE_PATH = "/playground"
SETTINGS_PATH = "/v1/playground"
FOLDER = Path(__file__).with_name("static")
FILES = {
    "": (FOLDER / "playground.html", "text/html; charset=utf-8"),
    "/playground.css": (FOLDER / "playground.css", "text/css; charset=utf-8"),
    "/playground.js": (FOLDER / "playground.js", "text/javascript; charset=utf-8"),
    "/sample.mp4": (demo_clip(), "video/mp4"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; media-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def attach(app: FastAPI) -> None:
    """Add the page's routes; they answer 404 where the server runs without it."""

    async def settings(request: Request) -> Response:
        serving = _state(request).serving
        body: dict[str, Any] = {
            "retention_ratio": serving.retention_ratio,
            "method": serving.method,
            "methods": list(serving.methods),
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    app.add_api_route(SETTINGS_PATH, settings, methods=["GET"], include_in_schema=False)
    for name, (path, media_type) in FILES.items():
        app.add_api_route(PAGE_PATH + name, _file(path, media_type), methods=["GET"], include_in_schema=False)


def _file(path: Path, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """A route for one file. Further arguments of a route would be read from the query."""

    async def file(request: Request) -> Response:
        _state(request)
        return FileResponse(path, media_type=media_type, headers=HEADERS)

    return file


def _state(request: Request) -> Any:
    state = request.app.state.score
    if state is None or not state.playground:
        raise HTTPException(404, "this server runs without the playground; start it with --playground")
    return state
