"""DyCoke (arXiv 2411.15024), temporal merging only: of four frames one stays whole, three are cut."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.methods import register
from score_vllm.methods.common import check_number, masked_indices, ranks, rows_at, similarity_to_frames, spread
from score_vllm.types import TokenSelection

GROUP = 4
# Above any 1 - cos: frames kept whole go first.
WHOLE_FRAME_SCORE = 3.0


def compared_frames(frames: int, device: torch.device) -> torch.Tensor:
    """The frame that each frame is compared with: odd ones with their even neighbour, the third of a group
    with its first (DyCoke, steps 1 and 2), and a group's first with the first of the group before.

    Returns:
        [T] int64; frame 0 stands for itself.
    """
    t = torch.arange(frames, device=device)
    step = torch.where(t % 2 == 1, 1, torch.where(t % GROUP == 2, 2, GROUP))
    return (t - step).clamp(min=0)


def nominal_pruning(retention_ratio: float) -> float:
    """Pruning share k that keeps ``retention_ratio`` of a video of whole groups: 1 - (4 rho - 1) / 3.

    Raises:
        ValueError: below 0.25, which whole first frames alone exceed.
    """
    if retention_ratio < 1 / GROUP:
        raise ValueError(
            f"retention_ratio of method 'dycoke' in reference mode must be in [0.25, 1], got {retention_ratio!r}: "
            "one frame in four stays whole; mode='exact' is defined below"
        )
    return 1 - (4 * retention_ratio - 1) / 3


def reference(
    x: torch.Tensor, retention_ratio: float, *, variant: str = "official", k: float | None = None, **_: Any
) -> TokenSelection:
    """DyCoke's temporal merging as published, with its defects: an odd last frame is lost, and of the last
    group the third frame stays whole where T is a multiple of 4.

    Args:
        x: [T, N, D], T > 4 (``port``: T > 1).
        retention_ratio: rho; gives ``k`` where none is given.
        variant: ``official``: k by :func:`nominal_pruning`; inside a cut frame tokens are in the order of
            ascending similarity. ``port``: VidCom2's port to Qwen-VL: k = 1 - rho, ascending indices.
        k: pruning share in [0, 1]; the ratio is not used then. The authors use 0.7.

    Returns:
        The kept tokens in the order that the published code emits them.

    Raises:
        TypeError, ValueError: ``k``, the ratio or T is out of range.
    """
    frames, per_frame, _d = x.shape
    least = 2 if variant == "port" else GROUP + 1
    if frames < least:
        raise ValueError(f"x of method 'dycoke' in reference mode must have T >= {least} frames, got {frames}")
    if k is None:
        k = 1 - retention_ratio if variant == "port" else nominal_pruning(retention_ratio)
    check_number("dycoke", "k", k, 0.0, 1.0)
    kept_of_cut = int((1 - k) * per_frame)

    similarity = similarity_to_frames(x, compared_frames(frames, x.device))
    t = torch.arange(frames, device=x.device)
    third = (t % GROUP == 2) & (t - 2 < frames - GROUP)
    cut = (t % 2 == 1) | third
    limit = torch.where(cut, kept_of_cut, per_frame)
    limit[frames - frames % 2 :] = 0
    rank = ranks(similarity)
    kept = rank < limit[:, None]
    # Whole frames keep their spatial order; cut ones that of similarity, unless the port sorts.
    by_similarity = cut & (variant == "official")
    place = torch.where(by_similarity[:, None], rank, torch.arange(per_frame, device=x.device))
    emitted = torch.sort((t[:, None] * per_frame + place)[kept]).indices
    return rows_at(x, kept.flatten().nonzero()[:, 0][emitted], 1 - similarity)


@register("dycoke", reference=reference, variants=("official", "port"))
def dycoke(x: torch.Tensor, num_retained: int, **_: Any) -> TokenSelection:
    """DyCoke's temporal merging (arXiv 2411.15024) at exactly K tokens, every frame in a group.

    The first frame of every four stays whole; the rest of the budget is shared evenly by the other frames,
    each keeping its tokens least similar to the frame it is compared with. The last group is no exception.

    DyCoke itself cannot go below a quarter: its whole frames alone are more. There, this keeps nothing of
    the cut frames, and the first frames share the budget evenly: each keeps its tokens least similar to the
    first frame of the group before, the very first evenly spaced ones. That is not the published method.

    Both variants are the same here: the ratio sets how much is pruned.

    Args:
        x: [T, N, D].
        num_retained: K.

    Returns:
        The selection; scores are ``1 - cos`` to the compared frame, 3 in frames kept whole.
    """
    frames, per_frame, _d = x.shape
    t = torch.arange(frames, device=x.device)
    first = t % GROUP == 0
    num_first = -(-frames // GROUP)
    scores = 1 - similarity_to_frames(x, compared_frames(frames, x.device))

    whole = num_retained >= num_first * per_frame
    if whole:
        budget, sharers = num_retained - num_first * per_frame, frames - num_first
        turn = torch.cumsum(~first, dim=0) - 1
        sharing = ~first
        scores[::GROUP] = torch.where(scores[::GROUP].isnan(), scores[::GROUP], WHOLE_FRAME_SCORE)
    else:
        budget, sharers = num_retained, num_first
        turn = t // GROUP
        sharing = first
    limit = torch.where(first, per_frame, 0) if whole else torch.zeros_like(t)
    if sharers:
        share = (turn + 1) * budget // sharers - turn * budget // sharers
        limit = torch.where(sharing, share, limit)
    if not whole and (of_first := budget // sharers):
        scores[0, spread(of_first, per_frame, x.device)] += WHOLE_FRAME_SCORE
    kept = ranks(scores, descending=True) < limit[:, None]
    return rows_at(x, masked_indices(kept, num_retained), scores)
