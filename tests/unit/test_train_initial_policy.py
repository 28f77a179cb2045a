"""A policy that learns in standardised inputs gives the same logits once it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from score_vllm import RetentionPolicy, select_tokens
from score_vllm.kernels.reference import residual, score
from score_vllm.train.config import load_settings
from score_vllm.train.initial_policy import StandardisedPolicy, make_policy
from score_vllm.train.schema import ConfigurationError

CONFIG = Path(__file__).resolve().parents[2] / "train" / "configs" / "demo.toml"


def video(seed: int) -> torch.Tensor:
    """Tokens with an offset, and channels that differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 12, 16, generator=generator) * torch.logspace(-1.5, 1, 16) + torch.linspace(-3, 8, 16)


@pytest.mark.parametrize("use_residual", [True, False])
def test_saved_weights_do_the_same(use_residual: bool, tmp_path: Path) -> None:
    policy = StandardisedPolicy(16, 32, use_residual=use_residual, seed=3)
    policy.measure([video(1), video(2)])
    x = video(7)
    # Literally: standardise the inputs, and score with the weights that learn.
    tokens = torch.cat([video(1), video(2)]).flatten(0, 1)
    torch.testing.assert_close(policy.mean[:16], tokens.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(policy.scale[:16], tokens.std(0, correction=0), atol=1e-5, rtol=1e-4)
    inputs = torch.cat([x, residual(x)][: 1 + use_residual], dim=2)
    inputs = (inputs - policy.mean) / policy.scale
    wanted = score(inputs, policy.w_in, policy.b_in, policy.w_out, policy.b_out, use_residual=False)
    torch.testing.assert_close(policy(x).flatten(), wanted, atol=1e-4, rtol=1e-4)
    saved = RetentionPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy", steps=1))
    torch.testing.assert_close(saved(x), policy(x), atol=1e-5, rtol=1e-5)
    assert saved.config.use_residual == use_residual
    assert torch.equal(select_tokens(x, 0.3, policy=saved).indices, select_tokens(x, 0.3, policy=policy).indices)


def test_a_constant_channel_is_not_blown_up() -> None:
    policy = StandardisedPolicy(16, 32)
    x = video(1)
    x[..., 4] = 2.0
    policy.measure([x])
    assert bool(policy.weights()[0].isfinite().all())
    assert float(policy.scale.min()) > 1e-3


def test_gradients_reach_the_weights_that_learn() -> None:
    policy = StandardisedPolicy(16, 32, seed=1)
    policy.measure([video(1)])
    policy(video(2)).sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in policy.parameters() if p.grad is not None)
    assert policy.w_in.grad is not None


def test_not_with_a_saved_policy(tmp_path: Path) -> None:
    saved = RetentionPolicy(16, 32).save_pretrained(tmp_path / "policy")
    settings = load_settings(CONFIG, ["policy.standardise=4", f"policy.init={saved}", f"output={tmp_path / 'run'}"])
    with pytest.raises(ConfigurationError, match=r"policy.standardise must be 0 with policy.init"):
        make_policy(settings, 16, "any")
