"""EVS, efficient video sampling (arXiv 2510.14624), as vLLM runs it: on cosines of neighbouring frames."""

from __future__ import annotations

from typing import Any

import torch

from score_vllm.methods import register
from score_vllm.methods.common import rows_at, similarity_to_frames, spread
from score_vllm.types import TokenSelection

# Above any 1 - cos, so that the first frame goes before everything else.
FIRST_FRAME_SCORE = 255.0


def change_scores(x: torch.Tensor) -> torch.Tensor:
    """``1 - cos`` of each token to the same place one frame before; 255 in the first frame (EVS, step 1).

    Args:
        x: [T, N, D].

    Returns:
        [T, N] float32.
    """
    previous = (torch.arange(x.shape[0], device=x.device) - 1).clamp(min=0)
    scores = 1.0 - similarity_to_frames(x, previous)
    # A NaN of the first frame has to stay one: select_tokens looks for it.
    scores[0] = torch.where(scores[0].isnan(), scores[0], FIRST_FRAME_SCORE)
    return scores


def reference(x: torch.Tensor, retention_ratio: float, **_: Any) -> TokenSelection:
    """EVS as in vLLM 0.33: the first frame is always whole, so at least N tokens are kept.

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1]; q = 1 - rho is formed first, as vLLM does, with its rounding.

    Returns:
        The ``max(N, int(T * N * (1 - q)))`` tokens of highest change, ascending.
    """
    frames, per_frame, _d = x.shape
    q = 1 - retention_ratio
    count = max(per_frame, int(frames * per_frame * (1 - q)))
    scores = change_scores(x).flatten()
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return rows_at(x, order.sort().values, scores)


@register("evs", reference=reference)
def evs(x: torch.Tensor, num_retained: int, **_: Any) -> torch.Tensor:
    """EVS (arXiv 2510.14624) at exactly K tokens: the first frame, then the tokens that changed most.

    With K >= N this is the published rule at K. With K < N the first frame does not fit, and the published code
    would keep N tokens all the same; here K tokens of the first frame are kept, evenly spaced.

    Args:
        x: [T, N, D].
        num_retained: K.

    Returns:
        [T * N] float32 scores, ``1 - cos`` to the frame before.
    """
    scores = change_scores(x)
    per_frame = x.shape[1]
    if num_retained < per_frame:
        chosen = torch.zeros(per_frame, device=x.device)
        chosen[spread(num_retained, per_frame, x.device)] = 1.0
        scores[0] += chosen
    return scores.flatten()
