"""The four tensors of a VisionSelector: read from a full checkpoint or from a folder of ours, checked, digested."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from score_vllm.methods.checkpoints import digest, read_tensors

PREFIXES = ("visual.importance_scorer.", "model.visual.importance_scorer.")
FIELDS = {
    "q_proj.weight": "q_weight",
    "q_proj.bias": "q_bias",
    "k_proj.weight": "k_weight",
    "k_proj.bias": "k_bias",
}


@dataclass(frozen=True, slots=True, eq=False)
class SelectorWeights:
    """Query and key projections, float32.

    Attributes:
        q_weight, k_weight: [H, D] with H = D / 2.
        q_bias, k_bias: [H].
    """

    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    k_bias: torch.Tensor

    def __post_init__(self) -> None:
        if self.q_weight.ndim != 2 or self.q_weight.shape[1] != 2 * self.q_weight.shape[0]:
            raise ValueError(f"q_proj.weight must be [D / 2, D], got {tuple(self.q_weight.shape)}")
        half, _width = self.q_weight.shape
        for published, name in FIELDS.items():
            tensor = getattr(self, name)
            expected = tuple(self.q_weight.shape) if published.endswith("weight") else (half,)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{published} must be {list(expected)}, got {list(tensor.shape)}")

    @classmethod
    def random(cls, hidden_size: int, seed: int = 0) -> SelectorWeights:
        """Seeded random weights of a width, which select nothing sensible: for tests and for timing."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(hidden_size // 2, hidden_size), (hidden_size // 2,)] * 2
        return cls(*(torch.randn(*shape, generator=generator) / hidden_size**0.5 for shape in shapes))

    @staticmethod
    def wanted(name: str) -> str | None:
        """The field that a tensor of a checkpoint fills; None for tensors that are not the selector's."""
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        return None if prefix is None else FIELDS.get(name.removeprefix(prefix))

    @classmethod
    def from_pretrained(cls, source: str) -> SelectorWeights:
        """Read the four tensors from a directory: a full checkpoint, or one that holds nothing else.

        Raises:
            FileNotFoundError: no weights are there.
            ValueError: a tensor is missing, damaged, of a wrong shape or not finite.
        """
        directory = Path(source).expanduser()
        tensors = read_tensors(directory, cls.wanted)
        if missing := [name for name, field in FIELDS.items() if field not in tensors]:
            raise ValueError(f"{directory} holds no VisionSelector: it lacks {PREFIXES[0]}{missing[0]}")
        try:
            return cls(**tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.q_weight.shape[1])

    def to(self, device: torch.device | str) -> SelectorWeights:
        """The same weights on a device."""
        if self.q_weight.device == torch.device(device):
            return self
        return SelectorWeights(**{name: getattr(self, name).to(device) for name in FIELDS.values()})

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        return {name: getattr(self, name) for name in FIELDS.values()}

    def save_pretrained(self, directory: Path) -> None:
        """Write ``model.safetensors`` with the published names, float32."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        tensors = {PREFIXES[0] + name: getattr(self, field).contiguous() for name, field in FIELDS.items()}
        partial = directory / "model.safetensors.part"
        save_file(tensors, partial)
        os.replace(partial, directory / "model.safetensors")

    def digest(self) -> str:
        """Of names, shapes and values, 16 hexadecimal digits."""
        return digest(self.named_tensors())
