"""How many tokens each segment and frame keeps under FastVID (arXiv 2503.11187): on the host, whole numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from score_vllm.methods.common import check_number, proportional_share


@dataclass(frozen=True, slots=True)
class Settings:
    """Hyper-parameters. ``c``: fewest segments; ``tau``: cut below this frame similarity; ``ignore``: frames
    more similar than this to the next are skipped (not llavaov); ``d``: share of context tokens; ``p``:
    frames per anchor; ``beta``: least weight of a context token against what it absorbs."""

    c: int = 8
    tau: float = 0.84
    ignore: float = 0.95
    d: float = 0.4
    p: int = 4
    beta: float = 0.6


# The authors' two, and VidCom2's port of the first to Qwen-VL without attention.
DEFAULTS = {
    "qwen25vl": Settings(),
    "llavaov": Settings(tau=0.9),
    "port": Settings(ignore=0.99, d=0.5, beta=0.5),
}


@dataclass(slots=True)
class Plan:
    """What each segment and frame keeps, on the host.

    ``segments`` are half-open frame ranges; ``salient`` and ``context`` are counts per frame; ``extra`` are
    further salient tokens per segment; ``own_frame`` says, per segment, that an anchor absorbs its own
    frame only.
    """

    segments: list[tuple[int, int]]
    salient: list[int]
    context: list[int]
    extra: list[int]
    own_frame: list[bool]


def settings_for(variant: str, options: dict[str, Any]) -> Settings:
    """The variant's settings with the options that are not None in their place.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range.
    """
    base = DEFAULTS[variant]
    chosen = {name: getattr(base, name) if value is None else value for name, value in options.items()}
    check_number("fastvid", "c", chosen["c"], 1, 2**31, whole=True)
    check_number("fastvid", "p", chosen["p"], 1, 2**31, whole=True)
    for name, low in (("tau", -1), ("ignore", -1), ("d", 0), ("beta", 0)):
        check_number("fastvid", name, chosen[name], low, 1)
    return Settings(**chosen)


def _below(value: float, threshold: float) -> bool:
    # In fp32, as the published code compares.
    return value < float(torch.tensor(threshold, dtype=torch.float32))


def find_segments(similarity: list[float], c: int, tau: float) -> list[tuple[int, int]]:
    """Cut after a frame where the similarity is among the c - 1 smallest or below tau (FastVID, DySeg)."""
    order = sorted(range(len(similarity)), key=similarity.__getitem__)
    cuts = set(order[: c - 1]) | {t for t, value in enumerate(similarity) if _below(value, tau)}
    edges = [0, *(t + 1 for t in sorted(cuts)), len(similarity) + 1]
    return list(itertools.pairwise(edges))


def _dealt(total: int, parts: int) -> list[int]:
    quotient, remainder = divmod(total, parts)
    return [quotient + (i < remainder) for i in range(parts)]


def _plan_runs(similarity: list[float], budget: int, per_frame: int, s: Settings) -> tuple[list[int], list[int]]:
    """Salient and context counts of one segment's frames (FastVID 3a, steps 1 and 2)."""
    frames = len(similarity) + 1
    context_total = min(max(int(budget * s.d), 1), budget)
    salient_total = budget - context_total
    if frames == 1:
        return [salient_total], [context_total]
    ends = [t for t, value in enumerate(similarity) if _below(value, s.ignore)] + [frames - 1]
    salient = _dealt(salient_total, len(ends))
    anchors = _dealt(context_total, -(-len(ends) // s.p))
    context = [min(anchors[i // s.p], per_frame // 2) if i % s.p == 0 else 0 for i in range(len(ends))][::-1]
    out_salient, out_context = [0] * frames, [0] * frames
    for end, sal, ctx in zip(ends, salient, context, strict=True):
        out_salient[end], out_context[end] = min(sal, per_frame - ctx), ctx
    return out_salient, out_context


def _plan_parallel(frames: int, budget: int, per_frame: int, s: Settings) -> tuple[list[int], list[int]]:
    """The same for FastVID 3b, at any budget: every frame keeps salient tokens, every p-th from the end context."""
    context_total = min(max(int(budget * s.d / frames) * frames, 1), budget)
    salient = _dealt(budget - context_total, frames)
    context = [0] * frames
    anchors = range(frames - 1, -1, -s.p)
    for t, share in zip(anchors, _dealt(context_total, len(anchors)), strict=True):
        context[t] = min(share, per_frame - salient[t])
    return salient, context


def plan_exact(similarity: list[float], per_frame: int, num_retained: int, variant: str, s: Settings) -> Plan:
    """Counts that sum to exactly K: segments share it by length; what caps lose becomes ``extra``."""
    frames = len(similarity) + 1
    segments = find_segments(similarity, min(s.c, frames), s.tau)
    plan = Plan(segments, [], [], [], [])
    shares = proportional_share(num_retained, [stop - start for start, stop in segments])
    for (start, stop), budget in zip(segments, shares, strict=True):
        if variant == "llavaov":
            salient, context = _plan_parallel(stop - start, budget, per_frame, s)
            plan.own_frame.append(s.p == 1)
        else:
            salient, context = _plan_runs(similarity[start : stop - 1], budget, per_frame, s)
            plan.own_frame.append(False)
        plan.salient += salient
        plan.context += context
        plan.extra.append(budget - sum(salient) - sum(context))
    return plan


def plan_reference(similarity: list[float], per_frame: int, ratio: float, variant: str, s: Settings) -> Plan:
    """The published counts, and its refusals.

    Raises:
        ValueError: where the published code fails: too few frames, or a share of zero or beyond a frame.
    """
    frames, budget = len(similarity) + 1, int(per_frame * ratio)
    if variant == "port":
        s = Settings(min(s.c, frames), s.tau, s.ignore, s.d, s.p, s.beta)
    if frames < s.c:
        raise ValueError(f"x of method 'fastvid' in reference mode must have T >= c={s.c} frames, got {frames}")
    segments = find_segments(similarity, s.c, s.tau)
    plan = Plan(segments, [], [], [0] * len(segments), [])
    for start, stop in segments:
        length = stop - start
        if variant == "llavaov":
            ctx = int(budget * s.d)
            anchors = range(length - 1, -1, -s.p)
            each = ctx * length // len(anchors)
            salient = [budget - ctx] * length
            context = [each if t in anchors else 0 for t in range(length)]
            plan.own_frame.append(each == ctx)
        else:
            salient, context = _plan_runs(similarity[start : stop - 1], budget * length, per_frame, s)
            plan.own_frame.append(False)
        # The port gets by without salient tokens, the authors' code does not.
        empty = (variant != "port" and sum(salient) == 0) or sum(context) == 0
        if empty or any(a + b > per_frame for a, b in zip(salient, context, strict=True)):
            raise ValueError(
                f"method 'fastvid' in reference mode cannot keep {ratio:g} of N={per_frame}: "
                f"frames {start} to {stop - 1} would keep {sum(salient)} salient and "
                f"{sum(context)} context tokens, at most N of one frame; use mode='exact'"
            )
        plan.salient += salient
        plan.context += context
    return plan
