"""The retention policy: a small MLP over each token and its surprise signal (paper section 4.2)."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from score_vllm.budget import num_retained_tokens
from score_vllm.config import FIRST_ARCHITECTURE, PolicyConfig, default_policy_width
from score_vllm.coverage import even_tokens
from score_vllm.files import may_replace, replaced_folder
from score_vllm.kernels import ops, reference
from score_vllm.types import VideoGrid

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "policy.safetensors"


class RetentionPolicy(torch.nn.Module):
    """Scores visual tokens on ``[X ; X_t - X_{t-1}]`` with one hidden layer: 2D -> H -> 1, GELU.

    Args:
        hidden_size: D, width of the visual tokens.
        policy_width: H; by default 512 for D >= 1024, else max(64, D).
        use_residual: False is the paper's ablation without the surprise signal (table 5).
        initial_keep_probability: p of a token under zero weights; sets the output bias.
        model_id: the model this policy is for; informative.
        architecture: vLLM's name of that model's architecture; serving refuses the policy elsewhere.
        seed: initialises the weights, independent of the global random state.
        ranked_share: of a video's tokens, see :class:`~score_vllm.config.PolicyConfig`.

    Raises:
        ValueError: a size is below 1, or the probability is not in (0, 1).
    """

    def __init__(
        self,
        hidden_size: int,
        policy_width: int | None = None,
        *,
        use_residual: bool = True,
        initial_keep_probability: float = 0.5,
        model_id: str = "",
        architecture: str = "",
        seed: int = 0,
        ranked_share: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 < initial_keep_probability < 1.0:
            raise ValueError(f"initial_keep_probability must be in (0, 1), got {initial_keep_probability!r}")
        width = default_policy_width(hidden_size) if policy_width is None else policy_width
        self.config = PolicyConfig(
            hidden_size,
            width,
            model_id=model_id,
            architecture=architecture,
            use_residual=use_residual,
            ranked_share=ranked_share,
        )
        inputs = hidden_size * (2 if use_residual else 1)
        generator = torch.Generator("cpu").manual_seed(seed)
        # Said outright: vLLM builds models under another default device and dtype.
        plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.w_in = torch.nn.Parameter(torch.randn(width, inputs, generator=generator, **plain) / inputs**0.5)
        self.b_in = torch.nn.Parameter(torch.zeros(width, **plain))
        self.w_out = torch.nn.Parameter(torch.randn(width, generator=generator, **plain) / width**0.5)
        bias = math.log(initial_keep_probability / (1.0 - initial_keep_probability))
        self.b_out = torch.nn.Parameter(torch.full((1,), bias, **plain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Retention logits; ``sigmoid`` of them is p of paper eq. 4.

        Args:
            x: [T, N, D] visual tokens of one video, bf16, fp16 or fp32.

        Returns:
            [T, N] float32. Differentiable in the policy's parameters when gradients are enabled.

        Raises:
            ValueError: ``x`` is not [T, N, D] with D = ``hidden_size``, or is empty.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.hidden_size or 0 in x.shape:
            raise ValueError(f"x must be a non-empty [T, N, D={self.config.hidden_size}] tensor, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be bf16, fp16 or fp32, got {x.dtype}")
        # The reference is differentiable; the fast path is for inference only.
        run = reference.score if torch.is_grad_enabled() else ops.score
        logits = run(x, *self.weights(), self.config.use_residual)
        return logits.view(x.shape[0], x.shape[1])

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(w_in, b_in, w_out, b_out)`` as the kernels take them."""
        return self.w_in, self.b_in, self.w_out, self.b_out

    def spread(self, grid: VideoGrid, num_retained: int) -> torch.Tensor | None:
        """Tokens that are kept whatever their logits: an even spread of what the budget has beyond ``ranked_share``.

        Args:
            grid: of the video.
            num_retained: K, the budget.

        Returns:
            [E < K] int64 flat indices, ascending, on the CPU; None where the logits choose all K.
        """
        count = num_retained - num_retained_tokens(grid.num_tokens, self.config.ranked_share)
        return even_tokens(grid, count) if count > 0 else None

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    def check_model(self, source: str, hidden_size: int, architecture: str) -> None:
        """Check that the policy was made for a model's tokens.

        Args:
            source: where the policy came from, for the message.
            hidden_size: D of the model.
            architecture: vLLM's name of the model.

        Raises:
            ValueError: its hidden size or architecture differs from the model's; both are in the message.
        """
        if self.hidden_size != hidden_size:
            raise ValueError(
                f"policy {source} was made for hidden size {self.hidden_size}, "
                f"but the model has hidden size {hidden_size}"
            )
        # The width alone says little: 3,584 is both Qwen2.5-VL-7B and LLaVA-Video-7B.
        trained_for = self.config.architecture or FIRST_ARCHITECTURE
        if trained_for != architecture:
            raise ValueError(f"policy {source} was made for {trained_for}, but the model is a {architecture}")

    def digest(self) -> str:
        """Hex digest of the configuration that changes scores and of every weight, for cache keys."""
        share = "" if self.config.ranked_share == 1 else f":{self.config.ranked_share}"
        digest = hashlib.sha256(f"{self.config.method}:{self.config.use_residual}{share}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, directory: str | os.PathLike[str], **provenance: Any) -> Path:
        """Write ``config.json`` and ``policy.safetensors``; the directory appears whole or not at all.

        Args:
            directory: created or replaced; its parent is created where missing.
            provenance: JSON-able facts added to the config's provenance.

        Returns:
            The directory.

        Raises:
            ValueError: the path exists and is not a policy directory.
        """
        target = Path(directory)
        if not may_replace(target, WEIGHTS_NAME):
            raise ValueError(
                f"{target} exists and is not a policy directory (no {WEIGHTS_NAME}); refusing to replace it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        config = self.config
        merged = replace(config, provenance={**config.provenance, **provenance})
        with replaced_folder(target) as staging:
            staging.mkdir()
            weights = {k: v.detach().cpu().float().contiguous() for k, v in self.state_dict().items()}
            save_file(weights, staging / WEIGHTS_NAME)
            # safetensors writes for the owner alone; whoever serves the policy may be another user.
            (staging / WEIGHTS_NAME).chmod(0o644)
            (staging / CONFIG_NAME).write_text(merged.to_json(), encoding="utf-8")
            staging.chmod(0o755)
        self.config = merged
        return target

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], revision: str | None = None) -> RetentionPolicy:
        """Load a policy from a directory, or from the Hugging Face hub.

        Args:
            source: a directory, or a hub id such as ``"owner/name"``.
            revision: of the hub repository.

        Returns:
            The policy, in fp32, on the CPU, in eval mode.

        Raises:
            FileNotFoundError: no such directory, a file is missing, or the hub does not have it.
            ValueError: a file is malformed, a weight has the wrong shape, or weights are not finite.
        """
        directory = resolve_directory(source, revision)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"policy directory {directory} lacks {name}; is it half-written?")
        config = PolicyConfig.from_file(directory / CONFIG_NAME)
        try:
            weights = load_file(directory / WEIGHTS_NAME)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / WEIGHTS_NAME} is not a complete safetensors file: {error}") from error
        policy = cls(
            config.hidden_size,
            config.policy_width,
            use_residual=config.use_residual,
            ranked_share=config.ranked_share,
        )
        expected = {name: tuple(p.shape) for name, p in policy.state_dict().items()}
        found = {name: tuple(w.shape) for name, w in weights.items()}
        if found != expected:
            raise ValueError(f"{directory / WEIGHTS_NAME} holds {found}, but its config.json asks for {expected}")
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{directory / WEIGHTS_NAME}: weight {name!r} has NaN or infinite values")
        policy.load_state_dict({k: v.float() for k, v in weights.items()})
        policy.config = config
        return policy.eval()


def resolve_directory(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local directory of a policy, fetched from the hub where ``source`` is a hub id.

    Raises:
        FileNotFoundError: no such directory and no such repository.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(source)
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not looks_like_hub_id:
        raise FileNotFoundError(f"policy directory {text!r} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(text, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"policy {text!r} is neither a directory nor a reachable repository on the Hugging Face hub: {error}"
        ) from error
    return Path(found)
