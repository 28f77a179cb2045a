"""vLLM's ``LLM`` with compression, for videos in bulk: it reads videos as score-serve does, and answers the same.

One bad file costs its own answer and no other's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from score_vllm.architectures import BY_NAME
from score_vllm.budget import check_retention_ratio
from score_vllm.catalog import DEMO, TRAINING_FREE_METHOD, resolve_model
from score_vllm.client import Reply
from score_vllm.config import ServingConfig
from score_vllm.policy import resolve_directory

# Videos that are read at once; the decoding processes are as many as there are cores.
_READERS = 8


class VideoRefused(Exception):
    """No answer to this video; the message says why."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What is run, and how videos are answered.

    Attributes:
        model: as score-serve's ``--model``.
        policy: directory or hub id of a retention policy; None: the demo's for the demo, else there is none.
        method: of selection; None: ``score`` where there is a policy, else a training-free one.
        retention_ratio: kept part of each video's tokens, in (0, 1].
        max_tokens: of an answer, >= 1.
        temperature: >= 0.
        engine_args: more of vLLM's ``EngineArgs``, such as ``tensor_parallel_size``.

    Raises:
        ValueError: a value out of range.
    """

    model: str
    policy: str | None = None
    method: str | None = None
    retention_ratio: float = 0.1
    max_tokens: int = 512
    temperature: float = 0.0
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must be a hub id, a directory or a short name, got ''")
        check_retention_ratio(self.retention_ratio)
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")

    def resolve(self) -> tuple[str, ServingConfig]:
        """The model that vLLM loads, and how it compresses.

        Raises:
            FileNotFoundError: there is no such policy.
            UsageError: there is no such model.
            ValueError: the method has no policy, or the policy no method.
        """
        model = resolve_model(self.model)
        policy = self.policy or (model.demo_policy if self.method in (None, "score") else None)
        method = self.method or ("score" if policy else TRAINING_FREE_METHOD)
        if (method == "score") != (policy is not None):
            raise ValueError(f"method {method!r} and policy {policy!r} do not go together: 'score' alone needs one")
        directory = str(resolve_directory(policy).resolve()) if policy else None
        return model.path, ServingConfig(self.retention_ratio, method, policy=directory)


class OfflineEngine:
    """One vLLM engine in this process, or below it.

    Args:
        options: what is run.
    """

    def __init__(self, options: EngineOptions) -> None:
        model, serving = options.resolve()
        chosen = os.environ.setdefault("VLLM_PLUGINS", "score")
        if "score" not in chosen.split(","):
            raise ValueError(f"VLLM_PLUGINS must name score, got {chosen!r}")
        from vllm import LLM

        from score_vllm.models.video_loaders import model_resize

        engine_args = {"limit_mm_per_prompt": {"video": 1, "image": 0}, **options.engine_args}
        if options.model == DEMO:
            engine_args.setdefault("enforce_eager", True)
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._llm = LLM(model, hf_overrides=serving.to_overrides(), **engine_args)
        architecture = BY_NAME[self._llm.model_config.hf_config.architectures[0]]
        fps, frames = architecture.sampling
        self._reading: dict[str, Any] = {"num_frames": frames, "fps": fps or 0}
        if (resize := model_resize(self._llm.renderer.get_mm_processor().info)) is not None:
            self._reading["resize"] = resize.to_json()
        self._params = self._llm.get_default_sampling_params()
        self._params.max_tokens, self._params.temperature = options.max_tokens, options.temperature
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read-video")

    def ask(self, questions: Sequence[tuple[Path, str]]) -> list[Reply | VideoRefused]:
        """One answer, or the reason why there is none, for each video and question."""
        prompts = list(self._readers.map(self._prompt, questions))
        good = [prompt for prompt in prompts if isinstance(prompt, dict)]
        answers = iter(self._generate(good))
        return [next(answers) if isinstance(prompt, dict) else prompt for prompt in prompts]

    def close(self) -> None:
        """End the engine's processes."""
        self._readers.shutdown()
        self._llm.llm_engine.engine_core.shutdown()

    def _prompt(self, question: tuple[Path, str]) -> dict[str, Any] | VideoRefused:
        from score_vllm.models.video_loaders import PyAVVideoLoader

        path, text = question
        try:
            video = PyAVVideoLoader.load_bytes(path.read_bytes(), **self._reading)
        except OSError as error:
            return VideoRefused(f"cannot read {path}: {error.strerror or error}")
        except ValueError as error:
            return VideoRefused(str(error))
        content = [{"type": "video"}, {"type": "text", "text": text}]
        template = self._llm.get_tokenizer().apply_chat_template
        prompt = template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "multi_modal_data": {"video": [video]}}

    def _generate(self, prompts: list[dict[str, Any]]) -> list[Reply | VideoRefused]:
        if not prompts:
            return []
        try:
            outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        except ValueError as error:  # one of them does not fit; vLLM then answers none
            if len(prompts) == 1:
                return [VideoRefused(str(error))]
            return [answer for prompt in prompts for answer in self._generate([prompt])]
        return [
            Reply(
                output.outputs[0].text,
                output.outputs[0].finish_reason,
                len(output.prompt_token_ids),
                len(output.outputs[0].token_ids),
                None,
            )
            for output in outputs
        ]
