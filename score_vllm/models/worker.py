"""What the API process may ask a worker: whether compression really is in place there."""

from __future__ import annotations

from typing import Any


class ScoreWorkerExtension:
    """Mixed into vLLM's worker through ``--worker-extension-cls``."""

    def score_status(self) -> dict[str, Any]:
        """The model class that this worker runs, and the digest of the policy that it holds.

        Asked once, when the server is ready: the timings of the profiling run are forgotten here.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        compressor = getattr(model, "compressor", None)
        policy = None if compressor is None else compressor.policy
        if compressor is not None:
            compressor.timer.reset()
        return {
            "model_class": type(model).__name__,
            "compressing": compressor is not None,
            "method": None if compressor is None else compressor.serving.method,
            "nan_videos": 0 if compressor is None else int(compressor.nan_videos),
            "policy_digest": "" if policy is None else policy.digest(),
        }


WORKER_EXTENSION = f"{ScoreWorkerExtension.__module__}.{ScoreWorkerExtension.__qualname__}"
