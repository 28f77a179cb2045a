"""lmms-eval's way to this server: the entry point's manifest, and the requests that its model sends.

Out of the box lmms-eval 0.7.3 sends a video as separate images, so that no video compressor is ever reached, has no
way to pass ``retention_ratio``, and scores a failed request: its text "[LMMS_EVAL_REQUEST_FAILED ...]" is read as
the answer "D". Here a video is one ``video_url`` part, the ratio is in every request, and a request that fails ends
the run. The class that lmms-eval drives is in ``lmms_eval_model.py``; nothing else of this package imports either.
"""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import random
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from score_vllm.budget import check_retention_ratio

MODEL_ID = "score_vllm"
RETRIED = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0


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


class RequestError(RuntimeError):
    """One request failed; the text says why."""


def video_url(address: str, send: str) -> str:
    """What stands in a ``video_url`` part for a video of a task.

    Args:
        address: a path, or a URL (http, https, file, data), which is passed on as it is.
        send: "file" for a file:// URL, which the server opens itself, or "base64" for a data URL.

    Raises:
        RequestError: the file is not there.
        ValueError: another ``send``.
    """
    if send not in ("file", "base64"):
        raise ValueError(f"send must be 'file' or 'base64', got {send!r}")
    if address.startswith(("http://", "https://", "file://", "data:")):
        return address
    path = Path(address)
    if not path.is_file():
        raise RequestError(f"the video {address} is not there")
    if send == "file":
        return path.resolve().as_uri()
    kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def openai_messages(messages: list[dict[str, Any]], send: str) -> list[dict[str, Any]]:
    """lmms-eval's chat messages as OpenAI's, each video as one part, in the task's order.

    Args:
        messages: what ``doc_to_messages`` gives: ``role``, and ``content``, a list of parts with ``type`` "text"
            (and ``text``) or "video" (and ``url``).
        send: see ``video_url``.

    Raises:
        RequestError: an image, audio, a clip of a video, or no path or URL: this adapter is for whole videos.
    """
    converted = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for content in message["content"]:
            kind = content["type"]
            if kind == "text":
                parts.append({"type": "text", "text": content["text"]})
            elif kind != "video":
                raise RequestError(f"the task sends {kind}; the {MODEL_ID} model is for tasks with videos and text")
            elif content.get("start_time") is not None or content.get("end_time") is not None:
                raise RequestError("the task asks about a part of a video (start_time, end_time), which cannot be sent")
            elif not isinstance(content["url"], str):
                raise RequestError(f"the task gives a video as {type(content['url']).__name__}, not as a path or URL")
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
    """The request's body; the ratio and the method are top-level fields, left out where None.

    Args:
        model: name on the server.
        messages: in OpenAI's form.
        retention_ratio: in (0, 1], or None for the server's default.
        retention_method: a method's name, or None.
        generation: a task's ``generation_kwargs``; ``max_new_tokens`` (16 where absent), ``temperature`` (0),
            ``top_p`` and ``seed`` are passed on, as by lmms-eval's own API models; ``num_beams`` above 1 is refused.

    Raises:
        RequestError: beam search is asked for.
    """
    if (generation.get("num_beams") or 1) != 1:
        raise RequestError(f"num_beams must be 1, got {generation['num_beams']!r}: the API has no beam search")
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": int(generation.get("max_new_tokens") or 16),
        "temperature": generation.get("temperature") or 0,
    }
    body |= {name: generation[name] for name in ("top_p", "seed") if generation.get(name) is not None}
    if retention_ratio is not None:
        body["retention_ratio"] = check_retention_ratio(retention_ratio)
    if retention_method is not None:
        body["retention_method"] = retention_method
    return body


class Endpoint:
    """A blocking client with retries, safe to share between threads.

    Args:
        base_url: the API's root, such as http://127.0.0.1:8000/v1.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds for one attempt.
        retries: repeats after a 408, 425, 429, 5xx, a timeout or a lost connection.
        first_wait: seconds before the first repeat; doubled each time, to at most 60.
    """

    def __init__(
        self, base_url: str, api_key: str | None, timeout: float, retries: int, first_wait: float = 1.0
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}")
        self.base_url, self.api_key = base_url.rstrip("/"), api_key
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait
        self._verified = False
        self._verifying = threading.Lock()

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion.

        Raises:
            RequestError: refused, or still failing after all retries, or not a chat completion with text.
        """
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(f"{self.base_url}/chat/completions", data=data, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _completion(response.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read()[:600].decode(errors='replace')}"
                if error.code not in RETRIED:
                    raise RequestError(problem) from error
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(min(LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1))
        raise RequestError(f"{problem} (after {self.retries + 1} tries)")

    def verify(self, body: dict[str, Any]) -> None:
        """Once: the prompt of this request must be shorter than at ratio 1; a stock server ignores the ratio.

        Raises:
            RequestError: it is not, or the server reports no usage, or a request failed.
        """
        asked = body.get("retention_ratio")
        with self._verifying:
            if self._verified or asked is None or asked == 1:
                return
            lengths = []
            for ratio in (asked, 1.0):
                usage = self.chat({**body, "retention_ratio": ratio, "max_tokens": 1}).get("usage") or {}
                if usage.get("prompt_tokens") is None:
                    raise RequestError("the server reports no usage.prompt_tokens, so compression cannot be verified")
                lengths.append(usage["prompt_tokens"])
            if lengths[0] >= lengths[1]:
                raise RequestError(
                    f"the server ignores retention_ratio: {lengths[0]} prompt tokens at {asked}, {lengths[1]} at 1; "
                    "start score-serve, or leave out retention_ratio"
                )
            self._verified = True


def _completion(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
        if not isinstance(answer["choices"][0]["message"]["content"], str):
            raise TypeError("content is not text")
    except (ValueError, LookupError, TypeError) as error:
        raise RequestError(f"not a chat completion with text: {content[:300]!r}") from error
    return answer
