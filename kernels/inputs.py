"""What the compressor's operations read beside the tokens: packed policy weights, and where each token stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Position digits per token: 3 axes (t, h, w) of 3 base-256 digits, low digit first.
AXES = 3
DIGITS = 3
POSITION_CHANNELS = AXES * DIGITS


@dataclass(frozen=True, slots=True, eq=False)
class PolicyWeights:
    """A retention policy's weights, cast once to the dtype of the tokens that it will score.

    Attributes:
        w_in: [H, 2D] over ``[x ; residual]``, or [H, D] without the residual; bf16, fp16 or fp32, contiguous.
        b_in: [H] float32.
        w_out: [H] float32.
        b_out: [1] float32.
        use_residual: False drops the surprise half (the paper's table 5).
    """

    w_in: torch.Tensor
    b_in: torch.Tensor
    w_out: torch.Tensor
    b_out: torch.Tensor
    use_residual: bool

    @property
    def width(self) -> int:
        """H."""
        return int(self.w_in.shape[0])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.w_in.shape[1]) // (2 if self.use_residual else 1)

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
    """Cast a policy's parameters once, for many calls. They are detached: kernels are for inference.

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

    return PolicyWeights(
        cast(w_in, dtype),
        cast(b_in, torch.float32),
        cast(w_out, torch.float32),
        cast(b_out, torch.float32),
        use_residual,
    )


@dataclass(frozen=True, slots=True, eq=False)
class PositionTable:
    """Where every token of a video stands, in T + 2 numbers; kernels derive the position digits of kept rows.

    Attributes:
        t_offsets: [T] int64, temporal offset of each cell: ``score_vllm.positions.temporal_offsets``. On the
            tokens' device where no copy is wanted (under CUDA-graph capture it must be).
        h: token rows per cell.
        w: token columns per cell; N = h * w.
    """

    t_offsets: torch.Tensor
    h: int
    w: int

    def __post_init__(self) -> None:
        if self.t_offsets.ndim != 1 or self.t_offsets.dtype != torch.int64:
            raise ValueError(
                f"PositionTable.t_offsets must be [T] int64, got {tuple(self.t_offsets.shape)} {self.t_offsets.dtype}"
            )
        if self.h < 1 or self.w < 1:
            raise ValueError(f"PositionTable.h and .w must be >= 1, got {self.h} and {self.w}")

    def on(self, device: torch.device) -> torch.Tensor:
        """``t_offsets`` on a device, without a host sync."""
        if self.t_offsets.device == device:
            return self.t_offsets
        to_gpu = device.type == "cuda" and self.t_offsets.device.type == "cpu"
        source = self.t_offsets.pin_memory() if to_gpu else self.t_offsets
        return source.to(device, non_blocking=True)
