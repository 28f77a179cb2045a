"""The two steps that FastVID and HoliTom share: density peaks as centres, and sums of what they absorb."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Elements of a block of distances, [frames, rows, N] fp32.
_BLOCK_ELEMENTS_CPU = 2**21
_BLOCK_ELEMENTS_GPU = 2**26


def squared_distances(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances, fp32, never negative.

    Args:
        rows: [B, R, D] fp32.
        tokens: [B, N, D] fp32.

    Returns:
        [B, R, N].
    """
    products = rows @ tokens.transpose(1, 2)
    norms = tokens.square().sum(-1)
    return (rows.square().sum(-1)[:, :, None] + norms[:, None, :] - 2 * products).clamp_(min=0)


def _peak_scores(
    z: torch.Tensor, valid: torch.Tensor, neighbours: int, step: int, scale: float, count_self: bool
) -> torch.Tensor:
    """:func:`density_peaks` of frames that fit in memory together, ``step`` rows of distances at a time."""
    count = z.shape[1]
    others = 0 if count_self else 1
    # Distances do not change under a shift; small norms lose less to cancellation.
    z = z - (z * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    columns = torch.arange(count, device=z.device)
    density, farthest = torch.empty_like(z[..., 0]), torch.zeros_like(z[:, 0, 0])

    def block(start: int, stop: int) -> torch.Tensor:
        d2 = squared_distances(z[:, start:stop], z) / scale
        # A token's distance to itself is 0, not what rounding makes of it.
        return d2.masked_fill_(columns[start:stop, None] == columns, 0.0)

    whole = None
    if step >= count:
        # Made symmetric, so that two tokens that are each other's nearest are exactly equally dense.
        whole = block(0, count)
        whole = (whole + whole.transpose(1, 2)) / 2

    for start in range(0, count, step):
        stop = min(start + step, count)
        d2 = (block(start, stop) if whole is None else whole).masked_fill(~valid[:, None, :], torch.inf)
        nearest = d2.topk(min(neighbours + others, count), dim=-1, largest=False).values
        found = nearest.isfinite()
        mean = torch.where(found, nearest, 0.0).sum(-1) / (found.sum(-1) - others).clamp(min=1)
        density[:, start:stop] = torch.exp(-mean)
        inside = torch.where(d2.isfinite() & valid[:, start:stop, None], d2, 0.0)
        farthest = torch.maximum(farthest, inside.amax(dim=(1, 2)))
    farthest = farthest.sqrt()

    scores = torch.empty_like(density)
    for start in range(0, count, step):
        stop = min(start + step, count)
        mine, before = density[:, start:stop, None], columns < columns[start:stop, None]
        denser = ((density[:, None, :] > mine) | ((density[:, None, :] == mine) & before)) & valid[:, None, :]
        distance = (block(start, stop) if whole is None else whole).sqrt()
        delta = torch.where(denser, distance, farthest[:, None, None]).amin(-1)
        scores[:, start:stop] = delta * density[:, start:stop]
    return scores.masked_fill_(~valid, -torch.inf)


def density_peaks(
    x: torch.Tensor,
    frames: torch.Tensor,
    valid: torch.Tensor,
    neighbours: int,
    *,
    scale: float | None = None,
    count_self: bool = True,
) -> torch.Tensor:
    """Density-peak score of every token inside its frame (DPC score, FastVID common pieces).

    Density is ``exp(-mean of the smallest squared distances / scale)``; the score is density times the distance to
    the nearest denser token, or the frame's largest distance where there is none. Of equally dense tokens the
    published codes let noise of 1e-6 decide which is denser; here it is the first.

    Args:
        x: [T, N, D] tokens.
        frames: [B] int64: the frames to look at.
        valid: [B, N] bool: the tokens that count, at least one in each frame.
        neighbours: how many smallest distances make the density; fewer where fewer tokens count.
        scale: of squared distances; None: D.
        count_self: whether the token itself, at distance 0, is one of the neighbours.

    Returns:
        [B, N] float32; -inf where not valid.
    """
    limit = _BLOCK_ELEMENTS_CPU if x.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    count, d = x.shape[1:]
    together = max(1, limit // (count * max(count, d)))
    step = max(1, min(count, limit // (together * count)))
    scores = []
    for start in range(0, frames.shape[0], together):
        z = x[frames[start : start + together]].float()
        scores.append(_peak_scores(z, valid[start : start + together], neighbours, step, scale or d, count_self))
    return torch.cat(scores)


def add_to_targets(rows: torch.Tensor, target: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> None:
    """Add each row to the sum of its target, in a fixed order: the result does not depend on the run.

    Args:
        rows: [S, D] fp32.
        target: [S] int64 in [0, C]; C means no target.
        sums: [C, D] fp32, changed in place.
        counts: [C] int64, changed in place.
    """
    number = sums.shape[0]
    order = torch.sort(target, stable=True)
    edges = torch.searchsorted(order.values, torch.arange(number + 2, device=target.device))
    bags = F.embedding_bag(order.indices, rows, edges[:-1], mode="sum")
    sums += bags[:number]
    counts += (edges[1:] - edges[:-1])[:number]
