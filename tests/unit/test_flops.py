"""FLOP counts against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.prefill import flops
from benchmarks.prefill.preset import PRESETS


def shape(**changes: int) -> object:
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 10,
    }
    return flops.TextShape(**{**sizes, **changes})


def test_hand_worked_count() -> None:
    # One layer's weights: q 4x4 = 16, k and v 4x2 each = 16, o 4x4 = 16, MLP 3 x 4x6 = 72; together 120.
    # 3 tokens: projections 2 * 3 * 120 = 720. Causal pairs 1 + 2 + 3 = 6, each 2 * 4 for the score and 2 * 4 for the
    # value: 96. Two layers: 2 * 816 = 1632. Head: 2 * 4 * 10 = 80.
    assert flops.prefill_flops(shape(), 3) == 1712
    # One token: 2 * (240 + 16) + 80.
    assert flops.prefill_flops(shape(), 1) == 592
    assert flops.flop_bound(shape(), 3, 1) == pytest.approx(1712 / 592)
    assert flops.flop_bound(shape(), 3, 3) == 1.0


def test_heads_wider_than_the_model() -> None:
    # Qwen3's heads need not add up to D: q 4x6, k and v 4x3 each, o 6x4 = 72, MLP 72; 2 * 144 + 4 * 6 for one token.
    wide = shape(num_hidden_layers=1, head_dim=3)
    assert flops.prefill_flops(wide, 1) == 2 * 144 + 24 + 80


def test_paper_shape() -> None:
    config = json.loads((PRESETS / "paper.json").read_text())["config"]
    seven = flops.TextShape.from_config(config)
    # 233,046,016 weights per layer (q and o 3584^2, k and v 3584 x 512, MLP 3 x 3584 x 18944) in 28 layers; per layer
    # and pair 4 * 3584; 42,657 tokens make 909,831,153 pairs.
    pairs, weights = 42657 * 42658 // 2, 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert (pairs, weights) == (909_831_153, 233_046_016)
    by_hand = 28 * (2 * 42657 * weights + 4 * 3584 * pairs) + 2 * 3584 * 152064
    assert flops.prefill_flops(seven, 42657) == by_hand == 921_913_052_110_848


def test_hybrid() -> None:
    # Of 4 layers one has attention: q with its gate 2 x 4x4, the others as above: 136 weights; 3 tokens and 6 pairs.
    # A delta net with 1 key head of 2 and 2 value heads of 3: 4 x (2 x 2 + 3 x 6 + 2 x 2) = 104, state 3 x 6 x 2 = 36,
    # MLP 72.
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 2}
    config = {name: getattr(shape(num_hidden_layers=4), name) for name in flops._SIZES}
    hybrid = flops.TextShape.from_config({**config, **linear, "linear_value_head_dim": 3})
    assert flops.prefill_flops(hybrid, 3) == (6 * 136 + 96) + 3 * 6 * (104 + 36 + 72) + 80
    kinds = ["linear_attention", "full_attention"] * 2
    halves = flops.TextShape.from_config({**config, **linear, "linear_value_head_dim": 3, "layer_types": kinds})
    assert halves.delta_net is not None
    assert (halves.delta_net.num_layers, hybrid.delta_net) == (2, flops.DeltaNetShape(3, 1, 2, 2, 3))


def test_configs() -> None:
    flat = {
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 5,
    }
    read = flops.TextShape.from_config(flat)
    assert (read.head_dim, read.num_key_value_heads) == (4, 2)
    nested = flops.TextShape.from_config({"hidden_size": 99, "text_config": {**flat, "head_dim": 3}})
    assert (nested.hidden_size, nested.head_dim) == (8, 3)
    with pytest.raises(ValueError, match="vocab_size"):
        flops.TextShape.from_config({k: v for k, v in flat.items() if k != "vocab_size"})
    with pytest.raises(ValueError, match="experts"):
        flops.TextShape.from_config({**flat, "num_experts": 8})
    with pytest.raises(ValueError, match="hidden_size must be an integer >= 1, got 0"):
        flops.TextShape.from_config({**flat, "hidden_size": 0, "head_dim": 1})
    with pytest.raises(ValueError, match="num_tokens must be >= 1"):
        flops.prefill_flops(read, 0)
    with pytest.raises(ValueError, match=r"tokens must be in \[1, 3\], got 4"):
        flops.flop_bound(read, 3, 4)
