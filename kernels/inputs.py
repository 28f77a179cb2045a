"""What the compressor's operations read beside the tokens: packed policy weights, and the place of each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from score_vllm.layout import AXES, DIGITS, VideoLayout

# Position digits per row: 3 axes (t, h, w) of 3 base-256 digits, low digit first.
POSITION_CHANNELS = AXES * DIGITS
# The same for the token id + 1 of a text row (0: not text), where a layout has text.
TEXT_CHANNELS = DIGITS


# What the second half of a packed ``w_in`` multiplies.
SecondOperand = Literal["none", "previous", "residual"]

# Largest |W2| / |W1| (Frobenius) at which the sum reads the previous frame instead of the residual. A token that does
# not move is scored by A - B, which is W1 to within the rounding of B: 1.6 times subtraction's error here, and
# growing with the ratio (docs/correctness.md).
MAX_RESIDUAL_RATIO = 2.0


def second_operand(w_in: torch.Tensor) -> SecondOperand:
    """How the sum over ``[x ; residual]`` is computed for these weights; waits for the device of ``w_in``.

    Returns:
        ``"previous"``: ``x A - previous B``, one plain product; ``"residual"``: subtract first, where the residual's
        weights outweigh the token's by more than ``MAX_RESIDUAL_RATIO``.
    """
    w_x, w_r = w_in.detach().float().chunk(2, dim=1)
    return "previous" if bool(w_r.norm() <= MAX_RESIDUAL_RATIO * w_x.norm()) else "residual"


def shift_matrices(w_in: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` and ``B`` of ``W1 x + W2 (x - previous) = A x - B previous``, rounded to the dtype of the tokens.

    ``A = W1 + W2``; ``B = A - W1`` takes up the rounding of A, so that a token that does not move keeps W1. Gradients
    pass through the rounding in full precision: that of W2 is a small difference of two large sums.

    Args:
        w_in: [H, 2D] ``[W1 ; W2]``.
        dtype: bf16, fp16 or fp32.

    Returns:
        [H, D] and [H, D] float32 tensors whose values ``dtype`` holds exactly.
    """
    w_x, w_r = w_in.float().chunk(2, dim=1)
    exact = w_x + w_r
    with torch.no_grad():
        a = exact.to(dtype).float()
        b = (a - w_x).to(dtype).float()
    return _with_gradient_of(exact, a), _with_gradient_of(w_r, b)


def _with_gradient_of(source: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value``, differentiated as if it were ``source``."""
    return value + (source - source.detach()) if source.requires_grad else value


@dataclass(frozen=True, slots=True, eq=False)
class PolicyWeights:
    """A retention policy's weights, cast once to the dtype of the tokens that it will score.

    Attributes:
        w_in: [H, 2D] over ``[x ; second operand]``, or [H, D] without one; bf16, fp16 or fp32, contiguous.
        b_in: [H] float32.
        w_out: [H] float32.
        b_out: [1] float32.
        second: ``"previous"``: ``w_in`` is ``[A ; -B]`` and its second half multiplies the same patch one frame
            earlier, zero before the first frame; ``"residual"``: ``w_in`` is ``[W1 ; W2]`` over the residual;
            ``"none"``: the policy has no surprise half (the paper's table 5).
    """

    w_in: torch.Tensor
    b_in: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor
    second: SecondOperand

    @property
    def width(self) -> int:
        """H."""
        return int(self.w_in.shape[0])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.w_in.shape[1]) // (1 if self.second == "none" else 2)

    def padded(self, multiple: int) -> PolicyWeights:
        """The same policy with H rounded up to a multiple: the added units' output weights are zero.

        Returns:
            ``self`` where H is a multiple already.
        """
        missing = -self.width % multiple
        if not missing:
            return self
        grow = torch.nn.functional.pad
        return replace(
            self,
            w_in=grow(self.w_in, (0, 0, 0, missing)),
            b_in=grow(self.b_in, (0, missing)),
            w_out=grow(self.w_out, (0, missing)),
        )


def pack_weights(
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    dtype: torch.dtype,
    use_residual: bool = True,
) -> PolicyWeights:
    """Prepare a policy's parameters once, for many calls. They are detached: kernels are for inference.

    Args:
        w_in: [H, 2D] weight of the hidden layer over ``[x ; residual]`` ([H, D] without the residual).
        b_in: [H].
        w_out: [H] weight of the output.
        b_out: [1].
        dtype: of the tokens: bf16, fp16 or fp32. Both operands of the product are rounded to it.
        use_residual: whether ``w_in`` has the residual half.

    Raises:
        ValueError: a shape does not fit, the dtype is not one of the three, or devices differ.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bf16, fp16 or fp32, got {dtype}")
    if w_in.ndim != 2 or (use_residual and w_in.shape[1] % 2):
        raise ValueError(f"w_in must be [H, {'2D' if use_residual else 'D'}], got {tuple(w_in.shape)}")
    width = w_in.shape[0]
    for name, tensor, length in (("b_in", b_in, width), ("w_out", w_out, width), ("b_out", b_out, 1)):
        if tensor.shape != (length,):
            raise ValueError(f"{name} must be [{length}], got {tuple(tensor.shape)}")
        if tensor.device != w_in.device:
            raise ValueError(f"{name} is on {tensor.device}, w_in is on {w_in.device}")

    def cast(tensor: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        return tensor.detach().to(to).contiguous()

    w_in = w_in.detach()
    second: SecondOperand = second_operand(w_in) if use_residual else "none"
    if second == "previous":
        a, b = shift_matrices(w_in, dtype)
        w_in = torch.cat([a, -b], dim=1)
    return PolicyWeights(
        cast(w_in, dtype),
        cast(b_in, torch.float32),
        cast(w_out, torch.float32),
        cast(b_out, torch.float32),
        second,
    )


@dataclass(frozen=True, slots=True, eq=False)
class PositionTable:
    """A video's layout as kernels read it: T + 2 rows of four numbers place any kept token.

    Attributes:
        affine: [T + 2, 4] int64 (slot, t, h, w) of each cell's first token, then what one row down and one column to
            the right add. On the tokens' device where no copy is wanted (under CUDA-graph capture it must be).
        h: token rows per cell.
        w: token columns per cell; N = h * w.
        structure: [S, 5] int64 (slot, t, h, w, token id + 1) of the rows that always stay, ascending; id + 1 is 0
            where the row is a parameter of the model.
        channels: 9, or 12 where a structure row is text.
    """

    affine: torch.Tensor
    h: int
    w: int
    structure: torch.Tensor
    channels: int = POSITION_CHANNELS

    def __post_init__(self) -> None:
        for name, columns in (("affine", 4), ("structure", 5)):
            table = getattr(self, name)
            if table.ndim != 2 or table.shape[1] != columns or table.dtype != torch.int64:
                raise ValueError(
                    f"PositionTable.{name} must be [rows, {columns}] int64, got {tuple(table.shape)} {table.dtype}"
                )
        if self.h < 1 or self.w < 1:
            raise ValueError(f"PositionTable.h and .w must be >= 1, got {self.h} and {self.w}")

    @classmethod
    def from_layout(cls, layout: VideoLayout) -> PositionTable:
        """The table of a layout, on the CPU."""
        affine = torch.from_numpy(np.concatenate([layout.cells, layout.steps]))
        structure = np.concatenate([layout.slots[:, None], layout.offsets, layout.ids[:, None] + 1], axis=1)
        channels = POSITION_CHANNELS + (TEXT_CHANNELS if layout.has_text else 0)
        return cls(affine, layout.grid.h, layout.grid.w, torch.from_numpy(structure), channels)

    @property
    def num_cells(self) -> int:
        """T."""
        return int(self.affine.shape[0]) - 2

    @property
    def num_structure(self) -> int:
        """S."""
        return int(self.structure.shape[0])

    def on(self, device: torch.device) -> PositionTable:
        """The table on a device, without a host sync."""
        if self.affine.device == device and (not self.num_structure or self.structure.device == device):
            return self
        return replace(self, affine=upload(self.affine, device), structure=upload(self.structure, device))


def upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, without a host sync."""
    pinned = device.type == "cuda" and table.device.type == "cpu" and table.numel()
    return (table.pin_memory() if pinned else table).to(device, non_blocking=True)
