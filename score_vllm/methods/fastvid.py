"""FastVID (arXiv 2503.11187): segments, salient tokens kept raw, and context tokens that absorb the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.methods import register
from score_vllm.methods.common import (
    block_tokens,
    everything,
    frame_blocks,
    masked_indices,
    ranks,
    saliency_or_norm,
)
from score_vllm.methods.fastvid_plan import DEFAULTS, Plan, plan_exact, plan_reference, settings_for
from score_vllm.methods.merging import add_to_targets, density_peaks
from score_vllm.types import TokenSelection

DENSITY_NEIGHBOURS = 4


def frame_similarity(x: torch.Tensor, frame_features: torch.Tensor | None) -> list[float]:
    """[T - 1] cosine of each frame's vector to the next one's: ``frame_features``, or the mean token."""
    if frame_features is None:
        vectors = torch.cat([x[start:stop].float().mean(dim=1) for start, stop in frame_blocks(x)])
    else:
        vectors = frame_features.float()
    return torch.cosine_similarity(vectors[1:], vectors[:-1], dim=-1).tolist()


def _absorb(
    x: torch.Tensor,
    frames: range,
    anchors: list[torch.Tensor],
    salient: torch.Tensor,
    targets_too: bool,
    beta: float,
) -> torch.Tensor:
    """Context rows after each has taken in its nearest tokens (FastVID, absorb).

    Args:
        x: [T, N, D].
        frames: whose tokens are absorbed.
        anchors: per anchor frame the flat indices of its context tokens; each anchor absorbs on its own.
        salient: [T * N] bool: never absorbed.
        targets_too: False leaves out an anchor's own context tokens (3a); True takes them in (3b).
        beta: least weight of the context token itself.

    Returns:
        [sum of context tokens, D] fp32, in the order of ``anchors``.
    """
    flat = x.reshape(-1, x.shape[-1])
    per_frame = x.shape[1]
    own = torch.cat(anchors)
    raw = flat[own].float()
    unit = F.normalize(raw, dim=-1)
    sums, counts = torch.zeros_like(raw), torch.zeros(len(own), dtype=torch.int64, device=x.device)
    step = block_tokens(x)
    for start in range(frames.start * per_frame, frames.stop * per_frame, step):
        stop = min(start + step, frames.stop * per_frame)
        rows = flat[start:stop].float()
        similarity = F.normalize(rows, dim=-1) @ unit.T
        numbers = torch.arange(start, stop, device=x.device)
        first = 0
        for mine in anchors:
            last = first + len(mine)
            left_out = salient[start:stop]
            if not targets_too:
                left_out = left_out | torch.isin(numbers, mine)
            target = similarity[:, first:last].argmax(dim=-1).masked_fill(left_out, len(mine))
            add_to_targets(rows, target, sums[first:last], counts[first:last])
            first = last
    weight = (1.0 / (counts + 1)).clamp(min=beta)[:, None]
    return weight * raw + (1 - weight) * sums / counts.clamp(min=1)[:, None]


def _carry_out(x: torch.Tensor, saliency: torch.Tensor, plan: Plan, targets_too: bool, beta: float) -> TokenSelection:
    """Keep and merge what the plan says; indices ascend."""
    frames, per_frame, d = x.shape
    device = x.device
    limits = torch.tensor([plan.salient, plan.context], device=device)
    salient = ranks(saliency, descending=True) < limits[0][:, None]
    context = torch.zeros_like(salient)
    if anchor_frames := [t for t in range(frames) if plan.context[t]]:
        at = torch.tensor(anchor_frames, device=device)
        peaks = density_peaks(x, at, ~salient[at], DENSITY_NEIGHBOURS)
        context[at] = ranks(peaks, descending=True) < limits[1][at][:, None]
    left = saliency.masked_fill(salient | context, -torch.inf)
    for (start, stop), extra in zip(plan.segments, plan.extra, strict=True):
        if extra:
            salient[start:stop] |= (ranks(left[start:stop].flatten(), descending=True) < extra).view(-1, per_frame)

    count = sum(plan.salient) + sum(plan.context) + sum(plan.extra)
    indices = masked_indices(salient | context, count)
    rows = x.reshape(-1, d)[indices]
    for (start, stop), own_frame in zip(plan.segments, plan.own_frame, strict=True):
        anchors = {
            t: t * per_frame + masked_indices(context[t], plan.context[t])
            for t in range(start, stop)
            if plan.context[t]
        }
        groups = [(range(t, t + 1), [mine]) for t, mine in anchors.items()] if own_frame else []
        if anchors and not own_frame:
            groups = [(range(start, stop), list(anchors.values()))]
        for sources, targets in groups:
            merged = _absorb(x, sources, targets, salient.flatten(), targets_too, beta)
            rows[torch.searchsorted(indices, torch.cat(targets))] = merged.to(x.dtype)
    return TokenSelection(indices, rows, saliency.flatten(), frames, per_frame)


def reference(
    x: torch.Tensor,
    retention_ratio: float,
    *,
    variant: str = "qwen25vl",
    saliency: torch.Tensor | None = None,
    frame_features: torch.Tensor | None = None,
    c: int | None = None,
    tau: float | None = None,
    ignore: float | None = None,
    d: float | None = None,
    p: int | None = None,
    beta: float | None = None,
    **_: Any,
) -> TokenSelection:
    """FastVID as published, without the 1e-6 noise that breaks ties.

    Args:
        x: [T, N, D] with T >= c.
        retention_ratio: rho in (0, 1]; each frame brings int(rho * N) tokens to its segment.
        variant: ``qwen25vl`` (FastVID 3a), ``llavaov`` (3b), or ``port``: 3a as VidCom2 ports it, with
            d 0.5, ignore 0.99, beta 0.5 and c at most T.
        saliency, frame_features: as in :func:`fastvid`.
        c, tau, ignore, d, p, beta: see :class:`~score_vllm.methods.fastvid_plan.Settings`; None takes the variant's.

    Returns:
        Salient rows raw and context rows merged, by ascending index; usually fewer than rho * T * N.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the published code fails on this input.
    """
    s = settings_for(variant, {"c": c, "tau": tau, "ignore": ignore, "d": d, "p": p, "beta": beta})
    ranking = saliency_or_norm(x, saliency, "fastvid")
    plan = plan_reference(frame_similarity(x, frame_features), x.shape[1], retention_ratio, variant, s)
    return _carry_out(x, ranking, plan, variant == "llavaov", s.beta)


@register("fastvid", reference=reference, variants=tuple(DEFAULTS), saliency="frame")
def fastvid(
    x: torch.Tensor,
    num_retained: int,
    *,
    variant: str = "qwen25vl",
    saliency: torch.Tensor | None = None,
    frame_features: torch.Tensor | None = None,
    c: int | None = None,
    tau: float | None = None,
    ignore: float | None = None,
    d: float | None = None,
    p: int | None = None,
    beta: float | None = None,
    **_: Any,
) -> TokenSelection:
    """FastVID (arXiv 2503.11187) at exactly K tokens.

    Segments share K by their length. What the published caps would lose goes to the segment's next most salient
    tokens, raw. Videos shorter than c frames are cut everywhere. At K = T * N all is returned unchanged.

    Args:
        x: [T, N, D].
        num_retained: K.
        variant: ``qwen25vl``, ``llavaov`` or ``port``; see :func:`reference`.
        saliency: [T, N]: for ``qwen25vl`` the mean over heads of the softmax of a frame's mean query against
            the merged keys in the last vision block. None uses the L2 norm: NOT the published method.
        frame_features: [T, E]: pooled vector of each frame (``llavaov`` publishes SigLIP's pooled output);
            None uses the mean token, as ``qwen25vl`` publishes.
        c, tau, ignore, d, p, beta: see :class:`~score_vllm.methods.fastvid_plan.Settings`; None takes the variant's.

    Returns:
        The selection; a context row is merged and stands at its own token's index. Scores are the saliency.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    s = settings_for(variant, {"c": c, "tau": tau, "ignore": ignore, "d": d, "p": p, "beta": beta})
    ranking = saliency_or_norm(x, saliency, "fastvid")
    if num_retained == ranking.numel():
        return everything(x)
    plan = plan_exact(frame_similarity(x, frame_features), x.shape[1], num_retained, variant, s)
    return _carry_out(x, ranking, plan, variant == "llavaov", s.beta)
