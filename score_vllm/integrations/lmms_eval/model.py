"""The model class that lmms-eval drives; importing this module needs lmms-eval."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from score_vllm.budget import check_retention_ratio
from score_vllm.client import SEND, Client, RequestFailed, compressed_lengths
from score_vllm.integrations.lmms_eval.manifest import EvaluationStopped, chat_body, openai_messages


class ScoreVideoModel(lmms):
    """Video tasks against an OpenAI-compatible server that takes ``retention_ratio``.

    Args (lmms-eval's ``--model_args``, with commas between):
        base_url: the API's root.
        model: name on the server.
        retention_ratio: in (0, 1]; left out: the server's default.
        retention_method: a method's name; left out: the server's.
        send: "file" (default; the server opens the path) or "base64".
        num_concurrent: most requests in flight.
        timeout: seconds for one attempt.
        max_retries: repeats after server errors, timeouts and lost connections.
        verify: false: do not compare the first prompt's length with that at ratio 1.

    The key is read from ``$OPENAI_API_KEY``. lmms-eval's own ``batch_size``, ``max_batch_size`` and ``device`` are
    accepted and without effect; other names are an error, where lmms-eval's models ignore them.

    Raises:
        EvaluationStopped: an argument of the wrong kind, outside its range, or unknown.
    """

    is_simple = False

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str = "demo",
        retention_ratio: float | None = None,
        retention_method: str | None = None,
        send: str = "file",
        num_concurrent: int = 4,
        timeout: float = 1800,
        max_retries: int = 5,
        verify: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        try:
            if unknown:
                raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
            if retention_ratio is not None:
                retention_ratio = check_retention_ratio(retention_ratio)
            if send not in SEND:
                raise ValueError(f"send must be 'file' or 'base64', got {send!r}")
            for name, value, least in (("num_concurrent", num_concurrent, 1), ("max_retries", max_retries, 0)):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
            key = os.environ.get("OPENAI_API_KEY")
            self.endpoint = Client(base_url, key, timeout=float(timeout), retries=max_retries)
        except (TypeError, ValueError) as error:
            raise EvaluationStopped(f"error: --model_args of score_vllm: {error}") from error
        self.model, self.send, self.num_concurrent = str(model), send, num_concurrent
        self.retention_ratio, self.retention_method = retention_ratio, retention_method
        self._verified = not verify

    async def _answer(self, request: Any, endpoint: Client, slots: asyncio.Semaphore) -> GenerationResult:
        _, doc_to_messages, generation, doc_id, task, split = request.args
        async with slots:
            try:
                # Read here and not earlier: only as many videos as slots are in memory.
                document = self.task_dict[task][split][doc_id]
                messages = await asyncio.to_thread(openai_messages, doc_to_messages(document), self.send)
                body = chat_body(self.model, messages, self.retention_ratio, self.retention_method, dict(generation))
                async with self._verifying:
                    if not self._verified and body.get("retention_ratio", 1) < 1:
                        await compressed_lengths(endpoint, body, [body["retention_ratio"]])
                        self._verified = True
                reply = await endpoint.chat(body)
                if reply.text is None:
                    raise RequestFailed("not a chat completion with text")
            except RequestFailed as error:
                raise RequestFailed(f"task {task}, document {doc_id}: {error}") from error
        counts = TokenCounts(input_tokens=reply.prompt_tokens, output_tokens=reply.completion_tokens)
        return GenerationResult(text=reply.text, token_counts=counts)

    async def _answer_all(self, requests: list[Any]) -> list[GenerationResult]:
        slots, self._verifying = asyncio.Semaphore(self.num_concurrent), asyncio.Lock()
        async with self.endpoint as endpoint:
            tasks = [asyncio.ensure_future(self._answer(request, endpoint, slots)) for request in requests]
            try:
                with tqdm(total=len(tasks), desc="score_vllm", unit="request", disable=self.rank != 0) as progress:
                    for task in asyncio.as_completed(tasks):
                        await task
                        progress.update()
            finally:
                for task in tasks:
                    task.cancel()
        return [task.result() for task in tasks]

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """One answer per request, in their order.

        Raises:
            EvaluationStopped: any request failed; those not yet started are not sent.
        """
        try:
            return asyncio.run(self._answer_all(requests))
        except RequestFailed as error:
            raise EvaluationStopped(f"error: {error}; no score is given") from error

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the score_vllm model answers single questions about videos")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the score_vllm model has no log-likelihoods; use generate_until tasks")
