"""CaCoVID's trained policy: one decoder layer and two scoring heads out of a full checkpoint, checked and digested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from score_vllm.methods.checkpoints import digest, read_config, read_tensors

PREFIX = "compression_policy."
HEAD_LAYERS = (0, 2, 4, 6, 8)
LAYER = "layers.0."


@dataclass(frozen=True, slots=True, eq=False)
class CacovidWeights:
    """One Qwen2 decoder layer and two scoring heads, float32.

    Attributes:
        tensors: by the checkpoint's names without ``compression_policy.``.
        heads: query heads.
        kv_heads: key and value heads.
        rope_theta: base of the rotary embedding.
        eps: of the normalisations.
    """

    tensors: dict[str, torch.Tensor]
    heads: int = 28
    kv_heads: int = 4
    rope_theta: float = 1e6
    eps: float = 1e-6

    def __post_init__(self) -> None:
        needed = [f"{LAYER}self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
        needed += [f"{LAYER}self_attn.o_proj.weight", f"{LAYER}input_layernorm.weight", "layernorm.weight"]
        needed += [f"{LAYER}mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
        needed += [f"{LAYER}post_attention_layernorm.weight"]
        heads = ("token_compress", "frame_compress")
        needed += [f"{h}.{i}.{kind}" for h in heads for i in HEAD_LAYERS for kind in ("weight", "bias")]
        if missing := [name for name in needed if name not in self.tensors]:
            raise ValueError(f"the CaCoVID policy lacks {len(missing)} of {len(needed)} tensors, first {missing[0]!r}")

    @classmethod
    def random(cls, hidden_size: int, seed: int = 0, heads: int = 1, kv_heads: int = 1) -> CacovidWeights:
        """Seeded random weights of a width, which select nothing sensible: for tests and for timing."""
        generator = torch.Generator().manual_seed(seed)
        d, narrow = hidden_size, hidden_size // heads * kv_heads

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / d**0.5

        tensors = {f"{LAYER}self_attn.{p}_proj.weight": noise(narrow if p in "kv" else d, d) for p in "qkvo"}
        tensors |= {f"{LAYER}self_attn.{p}_proj.bias": noise(narrow if p in "kv" else d) for p in "qkv"}
        tensors |= {f"{LAYER}mlp.{p}_proj.weight": noise(d, d) for p in ("gate", "up", "down")}
        norms = (f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight", "layernorm.weight")
        tensors |= {name: torch.ones(d) for name in norms}
        # D, D/2, D/4, D/8, D/16, 2; at least 2 wide
        widths = [max(2, d >> i) for i in range(len(HEAD_LAYERS))] + [2]
        for head in ("token_compress", "frame_compress"):
            for i, (wide, out) in zip(HEAD_LAYERS, pairwise(widths), strict=True):
                tensors |= {f"{head}.{i}.weight": noise(out, wide), f"{head}.{i}.bias": noise(out)}
        return cls(tensors, heads, kv_heads)

    @staticmethod
    def wanted(name: str) -> str | None:
        """A checkpoint's name without the policy's prefix; None for tensors that are not the policy's."""
        return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None

    @classmethod
    def from_pretrained(cls, source: str) -> CacovidWeights:
        """Read the policy out of a full checkpoint's directory; the heads' numbers come from its config.

        Raises:
            FileNotFoundError: no weights are there.
            ValueError: a tensor is missing, damaged or not finite, or the config names no heads.
        """
        directory = Path(source).expanduser()
        tensors = read_tensors(directory, cls.wanted)
        config = read_config(directory)
        config = config.get("text_config", config)
        try:
            heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{directory / 'config.json'} names no attention heads: {error!r}") from error
        return cls(
            tensors, heads, kv_heads, float(config.get("rope_theta", 1e6)), float(config.get("rms_norm_eps", 1e-6))
        )

    def to(self, device: torch.device | str) -> CacovidWeights:
        """The same weights on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        return {name.replace(".", "_"): tensor for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """Of settings, names, shapes and values, 16 hexadecimal digits."""
        settings = f"{self.heads},{self.kv_heads},{self.rope_theta},{self.eps}"
        return digest(dict(sorted(self.tensors.items())), settings)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.tensors["layernorm.weight"].shape[0])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Root-mean-square normalisation of ``x`` [..., D]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.tensors[name]

    def head(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Logit 1 minus logit 0 of a scoring head: [...] from ``x`` [..., D]."""
        for i in HEAD_LAYERS:
            x = F.linear(x, self.tensors[f"{name}.{i}.weight"], self.tensors[f"{name}.{i}.bias"])
            if i != HEAD_LAYERS[-1]:
                x = F.silu(x)
        return x[..., 1] - x[..., 0]
