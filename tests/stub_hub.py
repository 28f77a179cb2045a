"""A stub of the hub on 127.0.0.1 that serves one checkpoint by byte ranges."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from score_vllm.methods.visionselector_weights import PREFIXES

REPO, COMMIT = "owner/selector", "0123456789abcdef0123456789abcdef01234567"
D = 512
BODY = "model.layers.0.weight"


def write_checkpoint(folder: Path, *, width: int = D, prefix: str = PREFIXES[0], single: bool = False) -> None:
    """A checkpoint in the published layout: bf16, two shards with an index, mostly foreign tensors."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    half = width // 2
    shapes = {
        "q_proj.weight": (half, width),
        "q_proj.bias": (half,),
        "k_proj.weight": (half, width),
        "k_proj.bias": (half,),
    }
    tensors = {prefix + name: noise(*shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}))
    foreign = {BODY: noise(2048, 2048)}
    if single:
        save_file(tensors | foreign, folder / "model.safetensors")
        return
    first = {name: tensors[name] for name in list(tensors)[:2]}
    parts = {"model-00001-of-00002.safetensors": first | foreign}
    parts["model-00002-of-00002.safetensors"] = {name: tensors[name] for name in list(tensors)[2:]}
    for file, content in parts.items():
        save_file(content, folder / file)
    index = {"weight_map": {name: file for file, content in parts.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Hub(ThreadingHTTPServer):
    """The parts of the hub's HTTP API that reading files needs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent = 0
        self.break_after: int | None = None
        self.missing = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _entries(self) -> list[dict[str, Any]]:
        files = sorted(self.server.folder.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = set(re.findall(r"paths=([^&]*)", body)) or set(json.loads(body)["paths"])
        self._json([entry for entry in self._entries() if entry["path"] in wanted])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if self.server.missing:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/tree/" in path:
            self._json(self._entries())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": entry["path"]} for entry in self._entries()]
            self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self._file(self.server.folder / path.rsplit("/", 1)[1])

    def _file(self, file: Path) -> None:
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        part = data[start:stop]
        self.server.sent += len(part)
        if self.server.break_after is not None and self.server.sent > self.server.break_after:
            self._send(403, b"{}", {"X-Error-Message": "quota"})
            return
        headers = {"ETag": '"x"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self._send(206 if asked else 200, part, headers)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    write_checkpoint(tmp_path / "repo")
    server = Hub(tmp_path / "repo")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
