from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from score_vllm import RetentionPolicy
from score_vllm.config import PolicyConfig, ServingConfig, default_policy_width
from score_vllm.kernels import ops, reference


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return RetentionPolicy(32, seed=3, model_id="tiny").save_pretrained(tmp_path / "policy", origin="test")


def test_logits_by_the_paper(tmp_path: Path) -> None:
    """Equations 2 to 4, one token at a time, in float64."""
    policy = RetentionPolicy(16, seed=1)
    x = torch.randn(5, 7, 16)
    state = {k: v.detach().double() for k, v in policy.state_dict().items()}
    logits = policy(x)
    assert logits.shape == (5, 7)
    assert logits.dtype == torch.float32
    for t in range(5):
        for n in range(7):
            token = x[t, n].double()
            surprise = token - (x[t - 1, n].double() if t else 0.0)
            hidden = torch.nn.functional.gelu(state["w_in"] @ torch.cat([token, surprise]) + state["b_in"])
            expected = state["w_out"] @ hidden + state["b_out"]
            torch.testing.assert_close(logits[t, n].double(), expected[0], atol=1e-5, rtol=1e-5)


def test_residual_is_subtracted_in_fp32_and_rounded_once() -> None:
    x = torch.tensor([[[1.0]], [[1.0078125]], [[256.0]]], dtype=torch.bfloat16)
    expected = torch.tensor([1.0, 0.0078125, 255.0], dtype=torch.float32).bfloat16()
    assert torch.equal(reference.residual(x).flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inference_path_equals_the_reference(dtype: torch.dtype) -> None:
    policy = RetentionPolicy(48)
    x = torch.randn(90, 97, 48).to(dtype)
    with torch.no_grad():
        fast = policy(x).flatten()
        # Plain torch in the same dtype: on a CPU the hidden activation is rounded to it.
        w_in, b_in, w_out, b_out = (p.detach().to(dtype) for p in policy.parameters())
        hidden = torch.nn.functional.gelu(torch.cat([x, reference.residual(x)], dim=-1) @ w_in.T + b_in)
        plain = (hidden @ w_out + b_out).flatten()
    # Measured on the exact result: fast may be at most twice as far from it as plain is.
    double = [p.detach().double() for p in (policy.w_in.to(dtype), policy.b_in, policy.w_out, policy.b_out)]
    state = torch.cat([x.double(), reference.residual(x).double()], dim=-1)
    exact = torch.nn.functional.gelu(state @ double[0].T + double[1]) @ double[2] + double[3]
    error = (plain.double() - exact.flatten()).abs().max()
    assert (fast.double() - exact.flatten()).abs().max() <= 2 * error + 1e-6


def test_gradients_reach_every_parameter() -> None:
    policy = RetentionPolicy(16)
    policy(torch.randn(3, 4, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_initial_keep_probability() -> None:
    policy = RetentionPolicy(16, initial_keep_probability=0.9)
    assert torch.sigmoid(policy(torch.zeros(1, 1, 16)))[0, 0].item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="initial_keep_probability"):
        RetentionPolicy(16, initial_keep_probability=1.0)


def test_without_residual_ignores_time() -> None:
    policy = RetentionPolicy(16, use_residual=False)
    frame = torch.randn(1, 4, 16)
    logits = policy(frame.repeat(3, 1, 1))
    assert torch.equal(logits[0], logits[2])
    logits = RetentionPolicy(16)(frame.repeat(3, 1, 1))
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 15), (0, 3, 16), (2, 0, 16)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x must be"):
        RetentionPolicy(16)(torch.zeros(shape))
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        RetentionPolicy(16)(torch.zeros(1, 1, 16, dtype=torch.int64))


def test_round_trip(saved: Path) -> None:
    original, loaded = RetentionPolicy(32, seed=3), RetentionPolicy.from_pretrained(saved)
    x = torch.randn(3, 5, 32)
    assert torch.equal(original(x), loaded(x))
    assert loaded.digest() == original.digest()
    assert loaded.config.model_id == "tiny"
    assert loaded.config.provenance == {"origin": "test"}
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "policy.safetensors"]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["policy"], "nothing may be left beside it"


def test_save_replaces_a_policy_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    RetentionPolicy(32, seed=4).save_pretrained(saved)
    assert RetentionPolicy.from_pretrained(saved).digest() == RetentionPolicy(32, seed=4).digest()
    other = tmp_path / "home"
    other.mkdir()
    # A model's directory, too, has a config.json.
    (other / "config.json").write_text("do not lose me")
    with pytest.raises(ValueError, match="not a policy directory"):
        RetentionPolicy(32).save_pretrained(other)
    assert (other / "config.json").read_text() == "do not lose me"


def test_digest_changes_with_any_weight() -> None:
    policy = RetentionPolicy(16)
    before = policy.digest()
    with torch.no_grad():
        policy.b_out += 1e-6
    assert policy.digest() != before


def test_default_width() -> None:
    assert [default_policy_width(d) for d in (16, 128, 1023, 1024, 8192)] == [64, 128, 1023, 512, 512]


def test_default_device_and_dtype_do_not_leak_in() -> None:
    """vLLM builds models under another default dtype and device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            policy = RetentionPolicy(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.device.type, p.dtype) for p in policy.parameters()} == {("cpu", torch.float32)}


class TestBrokenDirectories:
    def test_missing(self, tmp_path: Path) -> None:
        for source in (tmp_path / "nowhere", "./nowhere", "nowhere"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                RetentionPolicy.from_pretrained(source)

    def test_unreachable_hub_id(self) -> None:
        with pytest.raises(FileNotFoundError, match="neither a directory nor a reachable repository"):
            RetentionPolicy.from_pretrained("nobody/no-such-policy")

    @pytest.mark.parametrize("name", ["config.json", "policy.safetensors"])
    def test_half_written(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
            RetentionPolicy.from_pretrained(saved)

    def test_truncated_weights(self, saved: Path) -> None:
        path = saved / "policy.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            RetentionPolicy.from_pretrained(saved)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, saved: Path, value: float) -> None:
        weights = load_file(saved / "policy.safetensors")
        weights["w_in"][0, 0] = value
        save_file(weights, saved / "policy.safetensors")
        with pytest.raises(ValueError, match="NaN or infinite"):
            RetentionPolicy.from_pretrained(saved)

    def test_weights_of_another_shape(self, saved: Path) -> None:
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
        with pytest.raises(ValueError, match="asks for"):
            RetentionPolicy.from_pretrained(saved)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("not json", "not valid JSON"),
            ("[]", "JSON object"),
            ({"hidden_size": None}, "hidden_size"),
            ({"hidden_size": 0}, "hidden_size"),
            ({"policy_width": True}, "policy_width"),
            ({"method": "magic"}, "method"),
            ({"use_residual": 1}, "use_residual"),
            ({"format_version": 99}, "format_version"),
            ({"surprise": 1}, "unknown keys"),
        ],
    )
    def test_bad_config(self, saved: Path, change: object, message: str) -> None:
        path = saved / "config.json"
        if isinstance(change, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        else:
            path.write_text(str(change))
        with pytest.raises(ValueError, match=message):
            RetentionPolicy.from_pretrained(saved)

    def test_config_without_sizes(self, saved: Path) -> None:
        (saved / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="lacks the keys"):
            PolicyConfig.from_file(saved / "config.json")

    def test_no_pickle_is_ever_read(self, saved: Path) -> None:
        shutil.move(saved / "policy.safetensors", saved / "policy.pt")
        with pytest.raises(FileNotFoundError):
            RetentionPolicy.from_pretrained(saved)


class TestServingConfig:
    def test_travels_through_a_hf_config(self) -> None:
        class Config:
            score = None

        config = Config()
        assert ServingConfig.from_hf_config(config) is None
        assert ServingConfig.from_hf_config(object()) is None
        serving = ServingConfig(0.25, "uniform")
        config.score = serving.to_overrides()["score"]
        assert ServingConfig.from_hf_config(config) == serving

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"retention_ratio": 0.0, "method": "uniform"}, "retention_ratio"),
            ({"retention_ratio": 0.1}, "needs policy"),
            ({"retention_ratio": 0.1, "method": 3}, "method"),
            ({"policy": 7}, "policy"),
            ({"method": "uniform", "allowed_methods": "random"}, "allowed_methods"),
            ({"method": "uniform", "allowed_methods": ["score"]}, "needs policy"),
            (
                {"method": "uniform", "cell_cache_gib": -1},
                r"cell_cache_gib must be a number of GiB in \[0, 4096\], got -1",
            ),
            ({"method": "uniform", "cell_cache_gib": float("nan")}, "cell_cache_gib"),
            ({"method": "uniform", "cell_cache_gib": True}, "cell_cache_gib"),
            ({"speed": 11}, "unknown keys"),
            ("fast", "must be an object"),
        ],
    )
    def test_refuses(self, raw: object, message: str) -> None:
        class Config:
            score = raw

        with pytest.raises(ValueError, match=message):
            ServingConfig.from_hf_config(Config())

    def test_cache_key_separates_what_differs(self) -> None:
        configs = [
            ServingConfig(1.0, "uniform"),
            ServingConfig(1.0, "random"),
            ServingConfig(1.0, "score", policy="p", policy_digest="d1"),
            ServingConfig(1.0, "score", policy="p", policy_digest="d2"),
        ]
        keys = {config.cache_key(ratio, config.method) for config in configs for ratio in (1.0, 0.5, 0.1)}
        assert len(keys) == 12
        one = ServingConfig(0.1, "uniform").cache_key(1, "uniform")
        assert one == ServingConfig(0.9, "random").cache_key(1.0, "uniform")

    def test_cells_are_reused_unless_the_cache_is_switched_off(self) -> None:
        assert ServingConfig(0.1, "uniform").reuses_cells
        assert ServingConfig(0.1, "uniform", cell_cache_gib=0.5).reuses_cells
        off = ServingConfig(0.1, "uniform", cell_cache_gib=0)
        assert not off.reuses_cells
        assert off.cell_cache_gib == 0.0

    def test_default_method_stands_first(self) -> None:
        serving = ServingConfig(0.1, "uniform", allowed_methods=["random", "uniform"])  # type: ignore[arg-type]
        assert serving.methods == ("uniform", "random")


def test_ops_topk_and_gather_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    indices, bad = ops.topk(scores, 2)
    assert indices.tolist() == [1, 2]
    assert not bad
    indices, bad = ops.topk(torch.tensor([float("nan"), 1.0, -float("inf")]), 2)
    assert bad
    assert indices.tolist()[-1] >= 1
    x = torch.arange(12.0).view(2, 3, 2)
    assert ops.gather(x, torch.tensor([0, 5])).tolist() == [[0.0, 1.0], [10.0, 11.0]]
    channels = torch.arange(6.0)[:, None]
    assert ops.gather(x, torch.tensor([1]), channels).tolist() == [[2.0, 3.0, 1.0]]
    for bad_k in (0, 6):
        with pytest.raises(ValueError, match="k must be in"):
            reference.topk(scores, bad_k)
    with pytest.raises(ValueError, match="float32"):
        reference.topk(scores.double(), 1)


def test_saved_policy_can_be_read_by_another_user(tmp_path: Path) -> None:
    folder = RetentionPolicy(8).save_pretrained(tmp_path / "policy")
    assert [oct(p.stat().st_mode & 0o777) for p in sorted(folder.iterdir())] == ["0o644", "0o644"]
