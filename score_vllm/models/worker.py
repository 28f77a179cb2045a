"""What the API process may ask a worker: whether compression really is in place there."""

from __future__ import annotations

import os
import platform
from typing import Any


class ScoreWorkerExtension:
    """Mixed into vLLM's worker through ``--worker-extension-cls``."""

    def score_status(self) -> dict[str, Any]:
        """The model class that this worker runs, and the digest of the policy that it holds.

        Asked when a server is ready: at the first time, the numbers of the profiling run are forgotten.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        compressor = getattr(model, "compressor", None)
        policy = None if compressor is None else compressor.policy
        if compressor is not None and not getattr(self, "_score_asked", False):
            compressor.stats.reset()
            if compressor.cells is not None:
                compressor.cells.clear()
            self._score_asked = True  # another API server may be serving already when the next one asks
        return {
            "model_class": type(model).__name__,
            "compressing": compressor is not None,
            "method": None if compressor is None else compressor.serving.method,
            "nan_videos": 0 if compressor is None else compressor.stats.nan_videos,
            "policy_digest": "" if policy is None else policy.digest(),
        }

    def score_check(self, policy_digest: str) -> None:
        """Refuse to serve without compression, or with another policy.

        vLLM asks every engine and hands on what the first one answers, and an error of any.

        Args:
            policy_digest: of the API process's policy; empty: there is none.

        Raises:
            RuntimeError: a sentence that names the machine.
        """
        status = self.score_status()
        where = f"a worker on {platform.node()} (pid {os.getpid()})"
        if not status["compressing"]:
            raise RuntimeError(f"{where} runs {status['model_class']} without SCORE: the plug-in did not load there")
        if policy_digest and status["policy_digest"] != policy_digest:
            raise RuntimeError(f"{where} holds another policy than the API process; start the server again")

    def score_selections(self, keys: list[str]) -> list[dict[str, Any] | None]:
        """Of each key what :meth:`score_vllm.models.selections.RecentSelections.explain` says."""
        compressor = getattr(self.model_runner.get_model(), "compressor", None)  # type: ignore[attr-defined]
        return [None if compressor is None else compressor.selections.explain(key) for key in keys]


WORKER_EXTENSION = f"{ScoreWorkerExtension.__module__}.{ScoreWorkerExtension.__qualname__}"
