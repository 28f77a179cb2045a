from __future__ import annotations

import itertools

import pytest

from score_vllm.train.config import OptimizerSettings, load_settings
from score_vllm.train.optimizer import LAST_SHARE, learning_rate_factor


def test_constant_rises_over_the_warm_up_and_stays() -> None:
    settings = OptimizerSettings(warmup_steps=4)
    assert [learning_rate_factor(n, 10, settings) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_one_to_a_twentieth() -> None:
    settings = OptimizerSettings(warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(n, 12, settings) for n in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx((1 + LAST_SHARE) / 2), "half-way"
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))
    assert LAST_SHARE < factors[-1] < 0.1


def test_steps_shape_a_cosine_run_but_not_a_constant_one(pytestconfig: pytest.Config) -> None:
    path = pytestconfig.rootpath / "train" / "configs" / "demo.toml"
    for schedule, same in (("constant", True), ("cosine", False)):
        one, two = (load_settings(path, [f"optimizer.schedule={schedule}", f"stage.main.steps={n}"]) for n in (5, 6))
        assert (one.digest() == two.digest()) is same
    assert one.model_copy(update={"output": "elsewhere"}).digest() == one.digest()
