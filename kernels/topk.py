"""Exact global top-K on the device, in four launches without a sync: radix selection and stable compaction.

A score becomes a 32-bit key whose unsigned order is the score's order. Three passes over the scores narrow the
K-th largest key down by 11, 11 and 10 bits: each counts, with shared-memory histograms, the next digit of the keys
that still match the threshold's known digits, and the pass after reads the threshold's next digit off the sum.
The last histogram is also kept per block, as suffix sums, so that the fourth launch knows without another pass over the
scores how many tokens every earlier block keeps, and writes the indices in ascending order in place.

Grid-wide results are needed four times (three digits and the offsets), so four launches are the fewest without
a barrier across the grid. Traffic: 4 reads of the scores (8 MB each at 2 million, L2-resident); scratch is
4 * (LOW_BINS + 1) / BLOCK, about 4, bytes a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from score_vllm.kernels.score import combine_rows

HIGH_BINS = 2048
LOW_BINS = 1024
HIGH_BITS = 11
LOW_BITS = 10

# One block size for every M: one variant to compile. 42 programs at the paper's size, 2000 at 2 million.
BLOCK = 1024
SCAN = 512
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _keys(scores):
    """Unsigned 32-bit keys in the order of the scores: NaN as -inf, -0 as +0, as the reference sorts them."""
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _threshold_digit(histogram, wanted, BINS: tl.constexpr):
    """The digit of the ``wanted``-th largest among the counted keys, and its rank among keys of that digit."""
    bins = BINS - 1 - tl.arange(0, BINS)
    at_least = tl.cumsum(tl.load(histogram + bins), axis=0)  # [BINS], from the largest digit down
    below_rank = at_least < wanted
    digit = BINS - 1 - tl.sum(below_rank.to(tl.int32), axis=0)
    return digit, wanted - tl.max(tl.where(below_rank, at_least, 0), axis=0)


@triton.jit
def _add_histogram(histogram, digits, mask, BINS: tl.constexpr):
    """Add this block's counts to the grid's; returns them, [BINS]."""
    counts = tl.histogram(digits.to(tl.int32), BINS, mask=mask)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts, mask=counts > 0, sem="relaxed")
    return counts


@triton.jit(do_not_specialize=["num_rows"])
def first_digit_kernel(
    partials,
    scores,
    high,
    has_nan,
    num_rows,
    GROUPS: tl.constexpr,
    HIGH_BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials [GROUPS, num_rows] -> scores [num_rows] where GROUPS > 1; histogram ``high`` and the NaN flag."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    values = combine_rows(partials, rows, num_rows, mask, GROUPS)
    if GROUPS > 1:
        tl.store(scores + rows, values, mask=mask)
    # Every program that writes the flag writes the same value.
    tl.store(has_nan, 1, mask=tl.max((mask & (values != values)).to(tl.int32), axis=0) > 0)
    _add_histogram(high, _keys(values) >> SHIFT, mask, HIGH_BINS)


@triton.jit(do_not_specialize=["num_rows", "wanted"])
def second_digit_kernel(
    scores,
    high,
    middle,
    num_rows,
    wanted,
    HIGH_BINS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram ``middle`` of the second digit of keys that share the threshold's first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    keys = _keys(tl.load(scores + rows, mask=mask, other=0.0))
    digit, _ = _threshold_digit(high, wanted, HIGH_BINS)
    prefix = keys >> LOW_BITS  # first and second digit
    matches = mask & ((prefix >> HIGH_BITS).to(tl.int32) == digit)
    _add_histogram(middle, prefix & (HIGH_BINS - 1), matches, HIGH_BINS)


@triton.jit(do_not_specialize=["num_rows", "wanted", "num_blocks"])
def third_digit_kernel(
    scores,
    high,
    middle,
    low,
    at_least,
    num_rows,
    wanted,
    num_blocks,
    HIGH_BINS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    LOW_BINS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram ``low`` of the third digit, and ``at_least`` [LOW_BINS + 1, num_blocks].

    ``at_least[d, b]`` counts the keys of block b whose 32 bits are no less than the threshold's first two digits
    followed by d; the last row counts those above every key with these two digits.
    """
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    keys = _keys(tl.load(scores + rows, mask=mask, other=0.0))
    first, rank = _threshold_digit(high, wanted, HIGH_BINS)
    second, _ = _threshold_digit(middle, rank, HIGH_BINS)
    prefix = (keys >> LOW_BITS).to(tl.int32)  # 22 bits
    threshold = first * HIGH_BINS + second
    counts = _add_histogram(low, keys & (LOW_BINS - 1), mask & (prefix == threshold), LOW_BINS)
    above = tl.sum((mask & (prefix > threshold)).to(tl.int32), axis=0)
    out = at_least + block
    tl.store(out + tl.arange(0, LOW_BINS) * num_blocks, tl.cumsum(counts, axis=0, reverse=True) + above)
    tl.store(out + LOW_BINS * num_blocks, above)


@triton.jit(do_not_specialize=["num_rows", "wanted", "num_blocks"])
def compact_kernel(
    scores,
    high,
    middle,
    low,
    at_least,
    indices,
    num_rows,
    wanted,
    num_blocks,
    HIGH_BINS: tl.constexpr,
    LOW_BINS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Write the kept indices, ascending: all keys above the threshold, and the first of those equal to it."""
    block = tl.program_id(0)
    first, rank = _threshold_digit(high, wanted, HIGH_BINS)
    second, rank = _threshold_digit(middle, rank, HIGH_BINS)
    third, ties_wanted = _threshold_digit(low, rank, LOW_BINS)

    # How many keys above, and equal to, the threshold stand in earlier blocks.
    above_before = tl.zeros((SCAN,), tl.int32)
    no_less_before = tl.zeros((SCAN,), tl.int32)
    for start in range(0, block, SCAN):
        others = start + tl.arange(0, SCAN)
        earlier = others < block
        no_less_before += tl.load(at_least + third * num_blocks + others, mask=earlier, other=0)
        above_before += tl.load(at_least + (third + 1) * num_blocks + others, mask=earlier, other=0)
    above_total = tl.sum(above_before, axis=0)
    ties_total = tl.sum(no_less_before, axis=0) - above_total

    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    keys = _keys(tl.load(scores + rows, mask=mask, other=0.0))
    prefix = (keys >> LOW_BITS).to(tl.int32)
    threshold = first * HIGH_BINS + second
    low_digit = (keys & (LOW_BINS - 1)).to(tl.int32)
    above = mask & ((prefix > threshold) | ((prefix == threshold) & (low_digit > third)))
    tie = mask & (prefix == threshold) & (low_digit == third)
    tie_rank = ties_total + tl.cumsum(tie.to(tl.int32), axis=0)  # 1 for the first tie of all
    keep = above | (tie & (tie_rank <= ties_wanted))
    kept_before = above_total + tl.minimum(ties_total, ties_wanted)
    slot = kept_before + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(indices + slot, rows, mask=keep)


def select(partials: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact top-K of the column sums of ``partials``; see :func:`score_vllm.kernels.reference.topk`.

    Args:
        partials: [G, M] float32, contiguous; the scores themselves where G is 1. M < 2^31.
        k: 1 <= k <= M.

    Returns:
        ``(indices, has_nan, scores)``: [k] int64 ascending, 0-dim bool, [M] float32. No host sync.
    """
    groups, num_rows = partials.shape
    device = partials.device
    num_blocks = triton.cdiv(num_rows, BLOCK)
    # One memset for all that the kernels accumulate into.
    counters = torch.zeros(2 * HIGH_BINS + LOW_BINS + 1, dtype=torch.int32, device=device)
    high, middle, low, flag = counters.split([HIGH_BINS, HIGH_BINS, LOW_BINS, 1])
    at_least = torch.empty(LOW_BINS + 1, num_blocks, dtype=torch.int32, device=device)
    scores = partials[0] if groups == 1 else torch.empty(num_rows, dtype=torch.float32, device=device)
    indices = torch.empty(k, dtype=torch.int64, device=device)
    grid = (num_blocks,)
    first_digit_kernel[grid](
        partials, scores, high, flag, num_rows,
        GROUPS=groups, HIGH_BINS=HIGH_BINS, SHIFT=32 - HIGH_BITS, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    second_digit_kernel[grid](
        scores, high, middle, num_rows, k,
        HIGH_BINS=HIGH_BINS, HIGH_BITS=HIGH_BITS, LOW_BITS=LOW_BITS, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    third_digit_kernel[grid](
        scores, high, middle, low, at_least, num_rows, k, num_blocks,
        HIGH_BINS=HIGH_BINS, HIGH_BITS=HIGH_BITS, LOW_BINS=LOW_BINS, LOW_BITS=LOW_BITS, BLOCK=BLOCK,
        **OPTIONS,
    )  # fmt: skip
    compact_kernel[grid](
        scores, high, middle, low, at_least, indices, num_rows, k, num_blocks,
        HIGH_BINS=HIGH_BINS, LOW_BINS=LOW_BINS, LOW_BITS=LOW_BITS, BLOCK=BLOCK, SCAN=SCAN, **OPTIONS,
    )  # fmt: skip
    has_nan = flag.view(torch.bool)[0]
    return indices, has_nan, scores
