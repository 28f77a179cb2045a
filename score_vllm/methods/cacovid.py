"""CaCoVID (repository LivingFutureLab/CaCoVID): a trained decoder layer scores frames and tokens of LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from score_vllm.methods import Weights, register
from score_vllm.methods.cacovid_weights import LAYER, CacovidWeights
from score_vllm.methods.common import check_number, everything, frame_blocks, masked_indices, ranks, rows_at
from score_vllm.types import TokenSelection

FRAME_TEMPERATURE = 3.0


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of ``x`` [H, L, d] at positions 0 to L - 1, halves against each other."""
    length, width = x.shape[1:]
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * theta**-exponent
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def decoder_rows(
    x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None, w: CacovidWeights
) -> torch.Tensor:
    """The layer's output at the video's rows.

    Without ``after`` attention is causal, as the published code runs: the question, which follows the video, is not
    seen. With it attention is unmasked, as that code was meant to be.

    Args:
        x: [T * N, D] video rows.
        before: [B, D] embeddings of the text before the video, or None.
        after: [A, D] embeddings of the newline and the text after the video, or None.
        w: weights on the device of ``x``.

    Returns:
        [T * N, D] float32.
    """
    begin = 0 if before is None else len(before)
    rows = torch.cat([part.float() for part in (before, x, after) if part is not None])
    normed = w.norm(rows, f"{LAYER}input_layernorm.weight")

    def project(part: str, heads: int) -> torch.Tensor:
        name = f"{LAYER}self_attn.{part}_proj"
        out = F.linear(normed, w.tensors[f"{name}.weight"], w.tensors[f"{name}.bias"])
        return out.view(len(rows), heads, -1).transpose(0, 1)

    query, key = _rotate(project("q", w.heads), w.rope_theta), _rotate(project("k", w.kv_heads), w.rope_theta)
    attended = F.scaled_dot_product_attention(
        query[None], key[None], project("v", w.kv_heads)[None], is_causal=after is None, enable_gqa=True
    )[0]
    rows = rows + F.linear(attended.transpose(0, 1).flatten(1), w.tensors[f"{LAYER}self_attn.o_proj.weight"])
    inner = w.norm(rows, f"{LAYER}post_attention_layernorm.weight")
    gate = F.silu(F.linear(inner, w.tensors[f"{LAYER}mlp.gate_proj.weight"]))
    gate = gate * F.linear(inner, w.tensors[f"{LAYER}mlp.up_proj.weight"])
    rows = rows + F.linear(gate, w.tensors[f"{LAYER}mlp.down_proj.weight"])
    return rows[begin : begin + len(x)]


def frame_budgets(logits: torch.Tensor, ratio: float, per_frame: int, imp_ratio: float, cap: float) -> list[int]:
    """How many important tokens each frame keeps (CaCoVID, step 1).

    Args:
        logits: [T] frame logits (1 minus 0).
        ratio: rho.
        per_frame: N.
        imp_ratio: share of the kept tokens that are chosen by importance.
        cap: largest share of a frame's tokens, before ``imp_ratio``.

    Returns:
        T numbers, ``int(imp_ratio * ratio * T * N)`` in all.
    """
    frames = len(logits)
    total = imp_ratio * ratio * frames * per_frame
    largest = logits.abs().max()
    scaled = FRAME_TEMPERATURE * logits / largest if largest > 0 else logits
    share = torch.softmax(scaled, dim=0).clamp(1 / (2 * frames), cap / (frames * ratio))
    wanted = torch.round(share / share.sum() * round(total))
    budgets = wanted.clamp(1, max(1, int(imp_ratio * per_frame * cap))).long().tolist()
    while missing := _floor(total) - sum(budgets):
        at = budgets.index(min(budgets) if missing > 0 else max(budgets))
        budgets[at] += 1 if missing > 0 else -1
    return budgets


def _floor(value: float) -> int:
    """Round down what is not whole by more than rounding error."""
    return int(value + 1e-9)


def choose(
    scores: torch.Tensor, frame_logits: torch.Tensor, count: int, ratio: float, imp_ratio: float, cap: float
) -> torch.Tensor:
    """[count] int64 ascending: important tokens by frame, the rest evenly over what is left (CaCoVID, steps 1 to 3).

    Args:
        scores: [T, N] token logits (1 minus 0).
        frame_logits: [T].
        count: tokens to keep, less than T * N.
        ratio, imp_ratio, cap: as in :func:`frame_budgets`.
    """
    budgets = torch.tensor(frame_budgets(frame_logits, ratio, scores.shape[1], imp_ratio, cap), device=scores.device)
    mask = (ranks(scores, descending=True) < budgets[:, None]).flatten()
    if (rest := count - int(budgets.sum())) > 0:
        others = (~mask).nonzero().flatten()
        places = torch.linspace(0, len(others) - 1, rest).round().long()
        mask[others[places.to(mask.device)]] = True
    return masked_indices(mask, count)


def logits(
    x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None, w: CacovidWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token logits [T, N] and frame logits [T], each 1 minus 0, of a video ``x`` [T, N, D]."""
    frames, per_frame, d = x.shape
    if d != w.hidden_size:
        raise ValueError(f"the CaCoVID policy reads D={w.hidden_size}, x is {tuple(x.shape)}")
    out = decoder_rows(x.reshape(-1, d), before, after, w).view(frames, per_frame, d)
    blocks = [w.head(w.norm(out[a:b], "layernorm.weight"), "token_compress") for a, b in frame_blocks(x)]
    return torch.cat(blocks), w.head(w.norm(out.mean(1), "layernorm.weight"), "frame_compress")


def _need(weights: CacovidWeights | None) -> CacovidWeights:
    if weights is None:
        raise ValueError("method 'cacovid' needs weights=CacovidWeights(...), trained for the model that x comes from")
    return weights


def reference(
    x: torch.Tensor,
    retention_ratio: float,
    *,
    weights: CacovidWeights | None = None,
    text_before: torch.Tensor | None = None,
    text_after: torch.Tensor | None = None,
    imp_ratio: float = 0.5,
    max_sample_ratio_for_each_frame: float | None = None,
    **_: Any,
) -> TokenSelection:
    """CaCoVID as published, ranked by logits (its softmax at 0.001 leaves near-ties).

    Args:
        x: [T, N, D].
        retention_ratio: rho in (0, 1].
        weights: the trained policy.
        text_before: [B, D] embeddings of the text before the video.
        text_after: [A, D] embeddings of what follows it; given: unmasked attention.
        imp_ratio: share of the kept tokens chosen by importance, in [0, 1].
        max_sample_ratio_for_each_frame: largest share of a frame; None: 1.5 * rho.

    Returns:
        ``int(rho * T * N)`` tokens, ascending.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, no weights, or frame logits that are all 0: there its code fails.
    """
    frames, per_frame, _d = x.shape
    check_number("cacovid", "imp_ratio", imp_ratio, 0, 1)
    cap = 1.5 * retention_ratio if max_sample_ratio_for_each_frame is None else max_sample_ratio_for_each_frame
    check_number("cacovid", "max_sample_ratio_for_each_frame", cap, 0, 100)
    count = _floor(retention_ratio * frames * per_frame)
    if count == frames * per_frame:
        return everything(x)
    scores, by_frame = logits(x, text_before, text_after, _need(weights))
    if not by_frame.abs().max() > 0:
        raise ValueError("method 'cacovid' in reference mode divides by zero: all frame logits are 0")
    return rows_at(x, choose(scores, by_frame, count, retention_ratio, imp_ratio, cap), scores)


@register(
    "cacovid",
    reference=reference,
    weights=Weights(
        CacovidWeights.from_pretrained,
        CacovidWeights.wanted,
        ("LlavaOnevisionForConditionalGeneration",),
    ),
)
def cacovid(
    x: torch.Tensor,
    num_retained: int,
    *,
    weights: CacovidWeights | None = None,
    text_before: torch.Tensor | None = None,
    imp_ratio: float = 0.5,
    **_: Any,
) -> TokenSelection:
    """CaCoVID at exactly K tokens, attention causal as it runs: it does not see the question.

    Args:
        x: [T, N, D] of LLaVA-OneVision.
        num_retained: K.
        weights: the trained policy.
        text_before: [B, D] embeddings of the text before the video; None: the video stands first.
        imp_ratio: share of the kept tokens chosen by importance, in [0, 1].

    Returns:
        The selection; scores are token logits, which rank inside a frame.

    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or there are no weights.
    """
    frames, per_frame, _d = x.shape
    check_number("cacovid", "imp_ratio", imp_ratio, 0, 1)
    w = _need(weights)
    if num_retained == frames * per_frame:
        return everything(x)
    ratio = num_retained / (frames * per_frame)
    scores, by_frame = logits(x, text_before, None, w)
    finite = by_frame.nan_to_num(0.0, 0.0, 0.0)
    return rows_at(x, choose(scores, finite, num_retained, ratio, imp_ratio, 1.5 * ratio), scores)
