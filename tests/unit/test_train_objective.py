"""Reward, advantage and loss against numbers worked by hand, and the law of the sampled rollouts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from score_vllm.train.objective.advantage import group_advantage, split_advantage
from score_vllm.train.objective.loss import (
    bernoulli_entropy,
    bernoulli_log_probability,
    choice_entropy,
    plackett_luce_log_probability,
    policy_loss,
)
from score_vllm.train.objective.reward import performance_reward, sparsity
from score_vllm.train.objective.rollout import (
    draw_ratio,
    micro_batches,
    noise_generator,
    sample_bernoulli,
    sample_exact,
)


def close(found: torch.Tensor, wanted: list[float], atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=atol)


def test_reward_by_hand() -> None:
    # tau * base = 1.02 * 2 = 2.04
    close(performance_reward(torch.tensor([2.0, 2.04, 2.5]), 2.0, 1.02), [0.04, 0.0, -0.46])


def test_sparsity_by_hand() -> None:
    masks = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    close(sparsity(masks), [0.0, 0.75, 1.0])


def test_split_advantage_mixed_by_hand() -> None:
    # Safe: S = 0.4 and 0.6, mean 0.5, population std 0.1 -> standing -1 and +1, times 0.1 and 0.2.
    delta = torch.tensor([0.1, -0.5, 0.2, 0.0])
    found = split_advantage(delta, torch.tensor([0.4, 0.8, 0.6, 0.9]), epsilon=1e-9)
    close(found, [-0.1, -0.4, 0.2, 0.0])


def test_split_advantage_all_safe_by_hand() -> None:
    # S = 0.2, 0.5, 0.8: mean 0.5, std sqrt(0.06) = 0.244949; 0.3 / 0.244949 = 1.224745.
    found = split_advantage(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.2, 0.5, 0.8]), epsilon=1e-9)
    close(found, [-1.224745, 0.0, 2.449490])


def test_split_advantage_all_violating_by_hand() -> None:
    found = split_advantage(torch.tensor([-1.0, -0.2, -0.3]), torch.tensor([0.5, 1.0, 0.0]))
    close(found, [-0.5, -0.2, 0.0])


def test_split_advantage_of_one_safe_rollout_is_zero() -> None:
    close(split_advantage(torch.tensor([0.3, -0.2]), torch.tensor([0.7, 0.5])), [0.0, -0.1])
    close(split_advantage(torch.tensor([0.3]), torch.tensor([0.7])), [0.0])


def test_split_advantage_at_equal_sparsity_is_zero_not_nan() -> None:
    close(split_advantage(torch.tensor([0.3, 0.1, 0.2]), torch.full((3,), 0.5)), [0.0, 0.0, 0.0])


def test_group_advantage_by_hand() -> None:
    # Mean 2, population std sqrt(2 / 3) = 0.816497.
    close(group_advantage(torch.tensor([1.0, 2.0, 3.0]), epsilon=1e-9), [1.224745, 0.0, -1.224745])
    close(group_advantage(torch.full((4,), 0.7)), [0.0] * 4)
    close(group_advantage(torch.tensor([5.0])), [0.0])


def test_bernoulli_log_probability_by_hand() -> None:
    # p = 0.5 and 0.8 (logit log 4): kept both, dropped both.
    logits = torch.tensor([0.0, math.log(4.0)])
    masks = torch.tensor([[True, True], [False, False]])
    wanted = [(math.log(0.5) + math.log(0.8)) / 2, (math.log(0.5) + math.log(0.2)) / 2]
    close(bernoulli_log_probability(logits, masks), wanted)


def test_log_probabilities_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    found = bernoulli_log_probability(logits, torch.tensor([[False, True]]))
    close(found, [-10.0], atol=1e-3)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_plackett_luce_sums_to_one_over_all_orders() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0])
    for k in (1, 2, 4):
        orders = torch.tensor(list(itertools.permutations(range(4), k)))
        total = (plackett_luce_log_probability(logits, orders) * k).exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0))


def test_plackett_luce_by_hand() -> None:
    # Weights 1, 2, 3: P(2 then 0) = 3/6 * 1/3.
    logits = torch.tensor([1.0, 2.0, 3.0]).log()
    close(plackett_luce_log_probability(logits, torch.tensor([[2, 0]])), [math.log(3 / 6 * 1 / 3) / 2])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_plackett_luce_gradient(k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    orders = torch.stack([torch.randperm(5)[:k] for _ in range(3)])
    assert torch.autograd.gradcheck(lambda v: plackett_luce_log_probability(v, orders), (logits,))


def test_policy_loss_by_hand() -> None:
    loss = policy_loss(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor(-0.5))  # -(2 * -1 + -1 * -3) / 2


def test_loss_gradient_by_hand() -> None:
    """d/dlogit of eq. 8 is -(1/K) sum A (m - p) / TN."""
    logits = torch.tensor([0.0, 1.0], requires_grad=True)
    masks = torch.tensor([[True, False], [True, True]])
    advantage = torch.tensor([0.5, -1.0])
    policy_loss(bernoulli_log_probability(logits, masks), advantage).backward()
    p = torch.sigmoid(logits.detach())
    wanted = -(advantage[:, None] * (masks.float() - p)).mean(0) / 2
    torch.testing.assert_close(logits.grad, wanted)


def test_entropies() -> None:
    close(bernoulli_entropy(torch.zeros(3)), math.log(2))  # type: ignore[arg-type]
    close(bernoulli_entropy(torch.full((3,), 30.0)), 0.0)  # type: ignore[arg-type]
    close(choice_entropy(torch.zeros(8)), 1.0)  # type: ignore[arg-type]
    assert float(choice_entropy(torch.tensor([50.0, 0.0]))) < 1e-6
    assert float(choice_entropy(torch.zeros(1))) == 0.0


def test_bernoulli_rollouts_follow_their_probabilities() -> None:
    logits = torch.tensor([-3.0, 0.0, 2.0])
    masks = sample_bernoulli(logits, 20000, noise_generator(0, "s", 1)).masks
    torch.testing.assert_close(masks.float().mean(0), torch.sigmoid(logits), rtol=0, atol=0.015)


def test_exact_rollouts_keep_k_and_follow_plackett_luce() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()
    rollouts = sample_exact(logits, 40000, 0.5, noise_generator(0, "s", 1))
    assert (rollouts.masks.sum(1) == 2).all()
    assert rollouts.orders is not None
    for pair in ([3, 2], [0, 1]):
        share = (rollouts.orders == torch.tensor(pair)).all(1).float().mean()
        wanted = (2 * plackett_luce_log_probability(logits, torch.tensor([pair]))).exp()[0]
        torch.testing.assert_close(share, wanted, rtol=0, atol=0.01)
    assert [k.tolist() for k in rollouts.kept()][:5] == [sorted(o) for o in rollouts.orders.tolist()][:5]


def test_noise_depends_on_seed_stage_and_slot_alone() -> None:
    def first(*key: object) -> float:
        return float(torch.rand((), generator=noise_generator(*key)))  # type: ignore[arg-type]

    assert first(1, "main", 7) == first(1, "main", 7)
    assert len({first(1, "main", 7), first(2, "main", 7), first(1, "warmup", 7), first(1, "main", 8)}) == 4


def test_ratios_are_log_uniform() -> None:
    drawn = torch.tensor([draw_ratio(0.06, 0.5, noise_generator(0, "s", i)) for i in range(4000)])
    assert drawn.min() >= 0.06
    assert drawn.max() <= 0.5
    halfway = math.sqrt(0.06 * 0.5)
    assert abs(float((drawn < halfway).float().mean()) - 0.5) < 0.03


@pytest.mark.parametrize("budget", [1, 10, 25, 1000])
def test_micro_batches_keep_the_budget(budget: int) -> None:
    lengths = [3, 9, 4, 10, 1, 7, 7]
    batches = micro_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    if budget == 1000:
        assert len(batches) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: performance_reward(torch.ones(2), 1.0, 0.9),
        lambda: performance_reward(torch.ones(2, 2), 1.0, 1.0),
        lambda: sparsity(torch.ones(2, 2)),
        lambda: split_advantage(torch.ones(2), torch.ones(3)),
        lambda: group_advantage(torch.ones(0)),
        lambda: bernoulli_log_probability(torch.ones(2), torch.ones(1, 3, dtype=torch.bool)),
        lambda: plackett_luce_log_probability(torch.ones(2), torch.zeros(1, 3, dtype=torch.int64)),
        lambda: policy_loss(torch.ones(2), torch.ones(3)),
        lambda: micro_batches([1], 0),
        lambda: draw_ratio(0.5, 0.1, torch.Generator()),
    ],
)
def test_wrong_arguments_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"must (both )?be"):
        call()  # type: ignore[operator]
