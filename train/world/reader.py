"""A small language model that reads frozen DINOv2 tokens of composite clips, as an engine of training.

A projector in front makes rows of its width out of the tokens; policies and baselines see the tokens themselves. The
checkpoint is a Qwen2.5-VL whose own tower is not used, with ``projector.safetensors`` and ``reader.json`` beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from score_vllm.train.frozen.model import DEFAULT_MAX_ROLLOUT_TOKENS, FrozenVLM
from score_vllm.train.schema import MissingError
from score_vllm.train.world.composite import GRID
from score_vllm.train.world.dinov2 import WIDTH, FootageEncoder
from score_vllm.types import VideoGrid

PROJECTOR, RECORD = "projector.safetensors", "reader.json"
# Of policies; no served model has it.
ARCHITECTURE = "FootageReader"


class Projector(torch.nn.Module):
    """Standardised tokens through one hidden layer, and where in the frame they stand; time is in the positions.

    Args:
        width: W of the language model.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )
        self.norm = torch.nn.LayerNorm(width)
        self.row = torch.nn.Parameter(0.3 * torch.randn(GRID, width))
        self.column = torch.nn.Parameter(0.3 * torch.randn(GRID, width))

    def standardised(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 384] with mean 0 and scale 1 per channel over the reader's clips."""
        return (x - self.mean) / self.scale

    def looks(self, x: torch.Tensor) -> torch.Tensor:
        """[..., W] of what tokens [..., 384] show, wherever they stand."""
        return self.norm(self.inner(self.standardised(x)))

    def forward(self, x: torch.Tensor, indices: torch.Tensor, grid: VideoGrid) -> torch.Tensor:
        """Rows [..., K, W] of tokens [..., K, 384] at flat indices [..., K] of a grid of GRID x GRID cells."""
        place = indices % grid.tokens_per_frame
        return self.looks(x) + self.row[place // grid.w] + self.column[place % grid.w]


def is_reader(path: str | Path) -> bool:
    """Whether a checkpoint is one of these."""
    return (Path(path) / PROJECTOR).is_file()


def record_of(path: str | Path) -> dict[str, Any]:
    """What ``reader.json`` says of a reader."""
    found: dict[str, Any] = json.loads((Path(path) / RECORD).read_text(encoding="utf-8"))
    return found


class FootageVLM(FrozenVLM):
    """The frozen reader behind its frozen encoder; arguments as of the base class.

    Attributes:
        projector: from tokens to rows.
        encoder: of frames.
    """

    def __init__(
        self, model: Any, path: str | Path, *, max_rollout_tokens: int = DEFAULT_MAX_ROLLOUT_TOKENS, **others: Any
    ) -> None:
        if not is_reader(path):
            raise MissingError(f"{path} has no {PROJECTOR}: it is no reader of score_vllm.train.world.reader_stage")
        self.encoder = FootageEncoder(record_of(path)["footage"])
        super().__init__(model, path, max_rollout_tokens=max_rollout_tokens, tower=self.encoder, **others)
        self.projector = Projector(self.model.config.get_text_config().hidden_size)
        self.projector.load_state_dict(load_file(Path(path) / PROJECTOR))
        self.projector.to(self.device, self.dtype).eval().requires_grad_(False)
        self.architecture = ARCHITECTURE

    @classmethod
    def tokens_of(cls, config: Any) -> tuple[int, str]:
        """See the base class."""
        return WIDTH, ARCHITECTURE

    def project(self, x: torch.Tensor, grid: VideoGrid) -> torch.Tensor:
        """See the base class."""
        rows: torch.Tensor = self.projector(x, torch.arange(len(x), device=x.device), grid)
        return rows


def save_projector(projector: Projector, folder: Path, record: dict[str, Any]) -> None:
    """Write the projector and the record into a reader's folder."""
    save_file({name: tensor.contiguous() for name, tensor in projector.state_dict().items()}, folder / PROJECTOR)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
