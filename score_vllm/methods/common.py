"""What several methods share: blocks of frames, ranks, even shares, the substitute saliency, results."""

from __future__ import annotations

import functools
import logging
import numbers
from collections.abc import Iterator

import torch

from score_vllm.types import TokenSelection

logger = logging.getLogger(__name__)

# Tokens per block: bounds the fp32 temporaries. Small enough for a CPU's caches, large enough for a GPU.
_BLOCK_TOKENS_CPU = 2048
_BLOCK_TOKENS_GPU = 32768


def block_tokens(x: torch.Tensor) -> int:
    """How many tokens to hold in fp32 at a time on the device of ``x``."""
    return _BLOCK_TOKENS_CPU if x.device.type == "cpu" else _BLOCK_TOKENS_GPU


def frame_blocks(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Half-open ranges of whole frames of ``x`` [T, N, D], at least one frame each."""
    step = max(1, block_tokens(x) // x.shape[1])
    for start in range(0, x.shape[0], step):
        yield start, min(start + step, x.shape[0])


def similarity_to_frames(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of every token with the token at the same place of another frame, in fp32.

    Args:
        x: [T, N, D].
        other: [T] int64 on the device of ``x``: the frame that each frame is compared with.

    Returns:
        [T, N] float32 in [-1, 1] up to rounding; 0 where a vector is zero.
    """
    out = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    for start, stop in frame_blocks(x):
        block, reference = x[start:stop].float(), x[other[start:stop]].float()
        out[start:stop] = torch.cosine_similarity(block, reference, dim=-1)
    return out


def ranks(values: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """Rank of every value inside its row, 0 first; ties to the lower index.

    Args:
        values: [..., M].

    Returns:
        [..., M] int64.
    """
    order = torch.sort(values, dim=-1, descending=descending, stable=True).indices
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def masked_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending flat indices of the True entries of ``mask``, their number known: no host sync.

    Args:
        mask: any shape, bool, with ``count`` True entries.
        count: that number.

    Returns:
        [count] int64.
    """
    return torch.sort(mask.flatten().to(torch.uint8), descending=True, stable=True).indices[:count]


def even_share(total: int, parts: int) -> list[int]:
    """``total`` things over ``parts`` places in order, by cumulative rounding: differs by at most one."""
    return proportional_share(total, [1] * parts)


def proportional_share(total: int, capacities: list[int]) -> list[int]:
    """``total`` things over places in proportion to their capacities, by cumulative rounding down.

    Args:
        total: at most the sum of the capacities.
        capacities: >= 0.

    Returns:
        Whole shares that sum to ``total``; no share is above its capacity, since each is its exact quota
        rounded up or down.
    """
    whole = sum(capacities)
    shares, reached, before = [], 0, 0
    for capacity in capacities:
        reached += capacity
        upto = total * reached // whole if whole else 0
        shares.append(upto - before)
        before = upto
    return shares


def spread(count: int, total: int, device: torch.device) -> torch.Tensor:
    """[count] int64 ascending: the centres of ``count`` equal bins over ``range(total)``."""
    return (2 * torch.arange(count, device=device) + 1) * total // (2 * count)


def everything(x: torch.Tensor) -> TokenSelection:
    """All tokens of ``x`` [T, N, D], unchanged; scores are 0."""
    frames, per_frame, d = x.shape
    total = frames * per_frame
    indices = torch.arange(total, device=x.device)
    scores = torch.zeros(total, dtype=torch.float32, device=x.device)
    return TokenSelection(indices, x.reshape(total, d), scores, frames, per_frame)


def rows_at(x: torch.Tensor, indices: torch.Tensor, scores: torch.Tensor) -> TokenSelection:
    """The selection of a method that keeps rows as they are: ``x`` [T, N, D] at ``indices`` [K]."""
    frames, per_frame, d = x.shape
    return TokenSelection(indices, x.reshape(-1, d)[indices], scores.float().flatten(), frames, per_frame)


@functools.cache
def _warn_about_stand_in(method: str) -> None:
    logger.warning(
        "method %r runs without saliency=: it ranks by the L2 norm of each token instead of the attention "
        "that the published method uses, so this is NOT the published method",
        method,
    )


def saliency_or_norm(x: torch.Tensor, saliency: torch.Tensor | None, method: str) -> torch.Tensor:
    """The saliency given, or the L2 norm as a substitute, which is said once per process in the log.

    Where a row of ``x`` or the saliency is not finite the result is NaN, so that ``select_tokens`` can tell.

    Args:
        x: [T, N, D].
        saliency: [T, N] or None.
        method: name for the log.

    Returns:
        [T, N] float32.
    """
    if saliency is None:
        _warn_about_stand_in(method)
    out = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    for start, stop in frame_blocks(x):
        norms = x[start:stop].float().norm(dim=-1)
        chosen = norms if saliency is None else saliency[start:stop].float()
        out[start:stop] = torch.where(norms.isfinite() & chosen.isfinite(), chosen, torch.nan)
    return out


def check_number(method: str, name: str, value: object, low: float, high: float, whole: bool = False) -> None:
    """Refuse an option outside its range.

    Raises:
        TypeError: ``value`` is not a number (or not a whole one where ``whole`` is set).
        ValueError: it is NaN or outside [low, high].
    """
    kind = numbers.Integral if whole else numbers.Real
    allowed = f"{'an integer' if whole else 'a number'} in [{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"option {name!r} of method {method!r} must be {allowed}, got {value!r}")
    if not low <= float(value) <= high:
        raise ValueError(f"option {name!r} of method {method!r} must be {allowed}, got {value!r}")
