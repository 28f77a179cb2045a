"""Requests as the e2e tests send them."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from score_vllm import num_retained_tokens
from score_vllm.server.content import OWN_FIELDS

from .conftest import API_KEY, Server


def data_url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def ask(*urls: str, text: str = "What happens?") -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def chat(server: Server, messages: list[dict[str, Any]], **fields: Any) -> Any:
    fields = {"max_tokens": 4, "temperature": 0, **fields}
    extra = {k: fields.pop(k) for k in list(fields) if k in EXTRA_FIELDS}
    return server.client().chat.completions.create(model="demo", messages=messages, extra_body=extra, **fields)


EXTRA_FIELDS = (*OWN_FIELDS, "mm_processor_kwargs", "media_io_kwargs", "ignore_eos")


def post(
    server: Server, path: str, body: dict[str, Any] | bytes, key: str | None = API_KEY
) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(server.url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def check_counts(answer: Any, ratio: float, method: str = "score") -> dict[str, Any]:
    score = answer.score
    assert score["method"] == method
    assert score["retention_ratio"] == ratio
    (video,) = score["videos"]
    t, h, w = video["grid"]
    assert video["original_tokens"] == t * h * w
    assert video["retained_tokens"] == num_retained_tokens(t * h * w, ratio)
    return video


def metrics(server: Server) -> dict[str, float]:
    """Our lines of the metrics page."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("score_"))}
