"""What the lmms-eval model sends, and the entry point by which lmms-eval finds it (no lmms-eval needed to import).

lmms-eval's own API models send frames as separate images, which no video compressor ever sees; they cannot pass
``retention_ratio``; and the text that stands for a failed request, "[LMMS_EVAL_REQUEST_FAILED ...]", is scored as
the answer "D". Here a video is one ``video_url`` part, the ratio is in every request, and a request that fails ends
the run. The class that lmms-eval drives is in ``model.py``; nothing else of this package imports either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from score_vllm import client
from score_vllm.budget import check_retention_ratio
from score_vllm.client import RequestFailed

MODEL_ID = "score_vllm"


def manifest() -> Any:
    """The ``lmms_eval.models.registry_v2.ModelManifest`` of our model; the entry point calls it.

    Imports only the registry: lmms-eval calls this while its own ``lmms_eval.models`` is still being imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="score_vllm.integrations.lmms_eval.model.ScoreVideoModel")


class EvaluationStopped(SystemExit):
    """There is no score: an argument is wrong, or a request failed after all retries.

    A ``SystemExit`` because lmms-eval's command line prints any ``Exception`` of a run and then exits with status 0.
    """


def video_url(address: str, send: str) -> str:
    """The URL of a task's video: a path is sent as :func:`score_vllm.client.video_url` does, a URL stays as it is.

    Raises:
        RequestFailed: the file is not there.
        ValueError: another ``send``.
    """
    if address.startswith(("http://", "https://", "file://", "data:")):
        return address
    try:
        if not Path(address).is_file():
            raise FileNotFoundError("no such file")
        return client.video_url(Path(address), send)
    except OSError as error:
        raise RequestFailed(f"the video {address} cannot be read: {error}") from error


def openai_messages(messages: list[dict[str, Any]], send: str) -> list[dict[str, Any]]:
    """lmms-eval's chat messages as OpenAI's, each video as one part, in the task's order.

    Args:
        messages: what ``doc_to_messages`` gives: ``role``, and ``content``, a list of parts with ``type`` "text"
            (and ``text``) or "video" (and ``url``).
        send: see :func:`video_url`.

    Raises:
        RequestFailed: an image, audio, a clip of a video, or no path or URL: this adapter is for whole videos.
    """
    converted = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for content in message["content"]:
            kind = content["type"]
            if kind == "text":
                parts.append({"type": "text", "text": content["text"]})
            elif kind != "video":
                raise RequestFailed(f"the task sends {kind}; the {MODEL_ID} model is for tasks with videos and text")
            elif content.get("start_time") is not None or content.get("end_time") is not None:
                raise RequestFailed("the task asks about a part of a video (start_time, end_time), which is not sent")
            elif not isinstance(content["url"], str):
                raise RequestFailed(f"the task gives a video as {type(content['url']).__name__}, not as a path or URL")
            else:
                parts.append({"type": "video_url", "video_url": {"url": video_url(content["url"], send)}})
        converted.append({"role": message["role"], "content": parts})
    return converted


def chat_body(
    model: str,
    messages: list[dict[str, Any]],
    retention_ratio: float | None,
    retention_method: str | None,
    generation: dict[str, Any],
) -> dict[str, Any]:
    """The request's body.

    Args:
        model: name on the server.
        messages: in OpenAI's form.
        retention_ratio: in (0, 1], or None for the server's default.
        retention_method: a method's name, or None.
        generation: a task's ``generation_kwargs``; ``max_new_tokens`` (16 where absent), ``temperature`` (0),
            ``top_p`` and ``seed`` are passed on, as by lmms-eval's own API models; ``num_beams`` above 1 is refused.

    Raises:
        RequestFailed: beam search is asked for.
        ValueError: the ratio is out of range.
    """
    if (generation.get("num_beams") or 1) != 1:
        raise RequestFailed(f"num_beams must be 1, got {generation['num_beams']!r}: the API has no beam search")
    return client.chat_body(
        model,
        messages,
        max_tokens=int(generation.get("max_new_tokens") or 16),
        temperature=generation.get("temperature") or 0,
        retention_ratio=None if retention_ratio is None else check_retention_ratio(retention_ratio),
        retention_method=retention_method,
        top_p=generation.get("top_p"),
        seed=generation.get("seed"),
    )
