"""What a running server keeps of a video: a client's request with ``score_explain``, and the frames of the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from score_vllm.client import Client, NotCompressed, chat_body, data_url, user_message
from score_vllm.types import TokenSelection, VideoGrid
from score_vllm.video.sandbox import decode_video_isolated
from score_vllm.viz.draw import Shown


def select_there(
    server: str,
    api_key: str | None,
    model: str | None,
    data: bytes,
    suffix: str,
    methods: Sequence[str] | None,
    ratio: float | None,
    fields: Mapping[str, Any],
) -> Shown:
    """Ask once per method; show the first frame of every cell, at the second that the server says.

    Args:
        server: its URL, with or without ``/v1``.
        api_key: None: none is sent.
        model: None: the server's first.
        data: the video file.
        suffix: of its name.
        methods: None: the server's default.
        ratio: None: the server's default.
        fields: further fields of the request; None leaves one out.

    Raises:
        RequestFailed: the server refuses, or does not explain what it kept.
        VideoError: the video cannot be decoded here.
    """
    scores = asyncio.run(_ask(server, api_key, model, data_url(data, suffix), methods, ratio, fields))
    reports = [score["videos"][0] for score in scores]
    first = reports[0]
    grid, seconds = VideoGrid(*first["grid"]), first["cell_seconds"]
    if seconds is None:
        raise NotCompressed("the server does not say when its frames were: it reads with --video-loader vllm")
    labels = [f"{score['method']} at {score['retention_ratio']:g}" for score in scores]
    selections = {label: _selection(report, grid) for label, report in zip(labels, reports, strict=True)}
    frames = [decode_video_isolated(data, max_frames=1, start=second).frames for second in seconds]
    return Shown(np.concatenate(frames), seconds, grid, selections)


async def _ask(
    server: str,
    api_key: str | None,
    model: str | None,
    url: str,
    methods: Sequence[str] | None,
    ratio: float | None,
    fields: Mapping[str, Any],
) -> list[dict[str, Any]]:
    async with Client(f"{server.rstrip('/').removesuffix('/v1')}/v1", api_key) as client:
        name = model or next(iter(await client.models()), "")
        scores = []
        for method in methods or (None,):
            chosen = {"retention_ratio": ratio, "retention_method": method, "score_explain": True, **fields}
            body = chat_body(name, [user_message(url, "What happens?")], max_tokens=1, **chosen)
            score = (await client.chat(body)).score or {}
            (video,) = score.get("videos") or [{}]
            if not video.get("kept_mask"):
                reason = video.get("kept_missing", "it knows no score_explain: is it a score-serve of this version?")
                raise NotCompressed(f"the server does not say what it kept: {reason}")
            scores.append(score)
        return scores


def _selection(report: Mapping[str, Any], grid: VideoGrid) -> TokenSelection:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(report["kept_mask"]), dtype=np.uint8), count=grid.num_tokens)
    indices = torch.from_numpy(np.flatnonzero(bits))
    # Rows and scores stay with the server.
    return TokenSelection(
        indices, torch.empty(len(indices), 0), torch.zeros(grid.num_tokens), grid.t, grid.tokens_per_frame
    )
