"""An even spread of tokens, and policies that leave a part of the budget to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from score_vllm import RetentionPolicy, VideoGrid, num_retained_tokens, select_tokens
from score_vllm.coverage import even_tokens
from score_vllm.train.objective.rollout import noise_generator, sample_exact

GRID = VideoGrid(10, 6, 8)


@pytest.mark.parametrize("count", [0, 1, 7, 48, 123, 479, 480])
def test_cells_rows_and_columns_get_their_share(count: int) -> None:
    even = even_tokens(GRID, count)
    assert even.unique(sorted=True).tolist() == even.tolist()
    assert len(even) == count
    kept = torch.zeros(GRID.num_tokens).index_fill(0, even, 1.0).view(10, 6, 8)
    for axes, most in (((1, 2), 1.0), ((0, 2), 4.0), ((0, 1), 4.0)):
        shares = kept.sum(axes)
        assert float((shares - shares.mean()).abs().max()) <= most


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.4, 1.0])
def test_the_best_are_kept_and_the_rest_is_even(ratio: float) -> None:
    policy = RetentionPolicy(16, 32, seed=2, ranked_share=0.06)
    x = torch.randn(10, 48, 16, generator=torch.Generator().manual_seed(1))
    budget, best = num_retained_tokens(480, ratio), 28
    kept = set(select_tokens(x, ratio, policy=policy, grid=GRID).indices.tolist())
    even = set(even_tokens(GRID, max(0, budget - best)).tolist())
    ranked = policy(x).flatten().argsort(descending=True).tolist()
    chosen = [token for token in ranked if token not in even][: min(budget, best)]
    assert kept == even | set(chosen)


def test_the_ranked_tokens_are_counted_as_the_budget_is() -> None:
    """In decimals, as written: a budget of the same share leaves nothing to spread."""
    policy = RetentionPolicy(16, 32, ranked_share=0.29)
    grid = VideoGrid(10, 2, 5)
    assert policy.spread(grid, num_retained_tokens(100, 0.29)) is None
    even = policy.spread(grid, num_retained_tokens(100, 0.3))
    assert even is not None
    assert len(even) == 1


def test_the_share_is_saved_and_changes_the_digest(tmp_path: Path) -> None:
    policy = RetentionPolicy(16, 32, seed=2, ranked_share=0.06)
    saved = RetentionPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    assert saved.config.ranked_share == 0.06
    assert saved.digest() == policy.digest() != RetentionPolicy(16, 32, seed=2).digest()
    with pytest.raises(ValueError, match=r"needs grid=VideoGrid"):
        select_tokens(torch.randn(10, 48, 16), 0.1, policy=policy)


@pytest.mark.parametrize("share", [0, 1.5, True, "0.1"])
def test_other_shares_are_refused(share: object) -> None:
    with pytest.raises(ValueError, match=r"ranked_share must be a number in \(0, 1\]"):
        RetentionPolicy(16, 32, ranked_share=share)  # type: ignore[arg-type]


def test_rollouts_draw_beside_the_even_tokens() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 0.0]).requires_grad_()
    even = torch.tensor([1, 4])
    rollouts = sample_exact(logits, 4000, 0.67, noise_generator(0, "s", 1), even)
    assert bool((rollouts.masks.sum(1) == 4).all())
    assert bool(rollouts.masks[:, even].all())
    first = rollouts.drawn_from[rollouts.orders[:, 0]]  # type: ignore[index]
    others = torch.softmax(logits.detach()[[0, 2, 3, 5]], dim=0)
    assert abs(float((first == 0).float().mean()) - float(others[0])) < 0.03
    rollouts.log_probability(logits).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[even].any()
    assert logits.grad[[0, 2, 3, 5]].all()
