"""A chat endpoint on the loopback for pure tests: it records requests and does what the test says."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[int, Any]


def completion(text: str = "A", prompt_tokens: int | None = 100) -> Answer:
    usage = None if prompt_tokens is None else {"prompt_tokens": prompt_tokens, "completion_tokens": 1}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {"choices": [choice], "usage": usage}


def compressing(body: dict[str, Any]) -> Answer:
    """A server that keeps ``retention_ratio`` of 1000 tokens, 0.1 by default."""
    return completion(prompt_tokens=20 + int(1000 * body.get("retention_ratio", 0.1)))


@dataclass
class Stub:
    """Set ``reply`` to what the server shall answer to a body; read ``bodies`` and ``headers`` afterwards."""

    url: str = ""
    reply: Callable[[dict[str, Any]], Answer] = compressing
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def stub_server() -> Iterator[Stub]:
    """A running stub; it is stopped at the end."""
    stub = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "stub"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.bodies.append(body)
            stub.headers.append(dict(self.headers))
            self._send(*stub.reply(body))

        def _send(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield stub
        server.shutdown()
