from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import score_vllm
from score_vllm import RetentionPolicy, TokenSelection, VideoGrid, methods, num_retained_tokens, select_tokens

POLICY = RetentionPolicy(16, seed=2)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9))


def options(method: str) -> dict:
    return {"policy": POLICY} if method == "score" else {}


@pytest.mark.parametrize("method", ["score", "uniform", "random"])
@given(size=SIZES, percent=st.integers(1, 100), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_every_method_keeps_its_promises(method: str, size: tuple[int, int], percent: int, seed: int) -> None:
    x = torch.randn(*size, 16, generator=torch.Generator().manual_seed(seed))
    kept = select_tokens(x, percent / 100, method=method, **options(method))
    total = size[0] * size[1]
    assert kept.num_retained == num_retained_tokens(total, percent / 100)
    assert kept.indices.dtype == torch.int64
    assert (kept.indices[1:] > kept.indices[:-1]).all()
    assert torch.equal(kept.embeddings, x.reshape(total, 16)[kept.indices])
    assert kept.scores.shape == (total,)
    assert kept.kept_per_frame().sum() == kept.num_retained
    again = select_tokens(x, percent / 100, method=method, **options(method))
    assert torch.equal(kept.indices, again.indices)
    if percent == 100:
        assert torch.equal(kept.indices, torch.arange(total))


@given(SIZES, st.integers(1, 99))
def test_score_is_the_stable_global_top_k(size: tuple[int, int], percent: int) -> None:
    x = torch.randint(0, 2, (*size, 16)).float()  # many exact ties
    kept = select_tokens(x, percent / 100, policy=POLICY)
    order = sorted(range(len(kept.scores)), key=lambda i: (-kept.scores[i].item(), i))
    assert kept.indices.tolist() == sorted(order[: kept.num_retained])


def test_constant_video_keeps_the_lowest_indices_of_equal_scores() -> None:
    kept = select_tokens(torch.zeros(3, 4, 16), 0.5, policy=POLICY)
    assert kept.indices.tolist() == [0, 1, 2, 3, 4, 5]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1.0))
def test_uniform_keeps_as_many_of_every_cell(t: int, h: int, w: int, ratio: float) -> None:
    kept = select_tokens(torch.zeros(t, h * w, 2), ratio, method="uniform", grid=VideoGrid(t, h, w)).kept_per_frame()
    assert kept.max() - kept.min() <= 1


@pytest.mark.parametrize(("t", "h", "w"), [(16, 8, 8), (64, 19, 35), (32, 12, 16)])
@pytest.mark.parametrize("ratio", [0.4, 0.25, 0.1])
def test_uniform_prefers_no_row_and_no_column(t: int, h: int, w: int, ratio: float) -> None:
    """A stride of four over eight columns would keep two of them."""
    kept = select_tokens(torch.zeros(t, h * w, 2), ratio, method="uniform", grid=VideoGrid(t, h, w))
    mask = torch.zeros(t * h * w)
    mask[kept.indices] = 1
    for line in (mask.view(t, h, w).mean((0, 2)), mask.view(t, h, w).mean((0, 1))):
        assert (line - ratio).abs().max() < 0.35 * ratio


def test_uniform_with_one_token_takes_it_from_the_middle() -> None:
    assert select_tokens(torch.zeros(9, 4, 2), 0.01, method="uniform").indices // 4 == 4


def test_random_follows_its_seed() -> None:
    x = torch.zeros(10, 10, 2)
    draws = [select_tokens(x, 0.3, method="random", seed=s).indices.tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_method_of_your_own() -> None:
    @methods.register("brightness")
    def brightness(x: torch.Tensor, num_retained: int, *, sign: float = 1.0, **_: object) -> torch.Tensor:
        return x.float().mean(-1).flatten() * sign

    try:
        x = torch.arange(6.0).view(2, 3, 1)
        assert select_tokens(x, 0.5, method="brightness").indices.tolist() == [3, 4, 5]
        assert select_tokens(x, 0.5, method="brightness", sign=-1.0).indices.tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match=r"takes the options \['sign'\]"):
            select_tokens(x, 0.5, method="brightness", colour=1)
        methods.register("brightness")(brightness)  # the same function again is fine
        with pytest.raises(ValueError, match="registered already"):
            methods.register("brightness")(lambda x, num_retained: x)
    finally:
        methods._METHODS.pop("brightness")


def test_wrong_calls() -> None:
    x = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match=r"method must be one of .*'random', 'score'.*'uniform'"):
        select_tokens(x, 0.5, method="magic")
    with pytest.raises(ValueError, match="needs policy"):
        select_tokens(x, 0.5)
    with pytest.raises(ValueError, match="D=16"):
        select_tokens(torch.randn(2, 3, 8), 0.5, policy=POLICY)
    with pytest.raises(ValueError, match=r"\[T, N, D\]"):
        select_tokens(torch.randn(6, 16), 0.5, method="uniform")
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        select_tokens(torch.zeros(2, 3, 4, dtype=torch.int32), 0.5, method="uniform")
    with pytest.raises(ValueError, match="saliency"):
        select_tokens(x, 0.5, method="uniform", saliency=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="NaN scores"):
        select_tokens(torch.full((2, 3, 16), float("nan")), 0.5, policy=POLICY)
    with pytest.raises(ValueError, match="lower-case identifier"):
        methods.register("Not A Name")


def test_types_check_themselves() -> None:
    with pytest.raises(ValueError, match=r"VideoGrid\.t"):
        VideoGrid(0, 1, 1)
    with pytest.raises(ValueError, match=r"VideoGrid\.w"):
        VideoGrid(1, 1, 1.0)  # type: ignore[arg-type]
    assert VideoGrid(2, 3, 4).num_tokens == 24
    good = {"indices": torch.tensor([0]), "embeddings": torch.zeros(1, 2), "scores": torch.zeros(4)}
    assert "K=1 of T*N=2*2" in repr(TokenSelection(**good, num_frames=2, tokens_per_frame=2))
    for change, name in [
        ({"indices": torch.tensor([0.0])}, "indices"),
        ({"embeddings": torch.zeros(2, 2)}, "embeddings"),
        ({"scores": torch.zeros(5)}, "scores"),
        ({"indices": torch.empty(0, dtype=torch.int64), "embeddings": torch.zeros(0, 2)}, "keeps 0"),
    ]:
        with pytest.raises(ValueError, match=name):
            TokenSelection(**{**good, **change}, num_frames=2, tokens_per_frame=2)


def test_public_surface() -> None:
    assert sorted(score_vllm.__all__) == [
        "RetentionPolicy",
        "TokenSelection",
        "VideoGrid",
        "num_retained_tokens",
        "select_tokens",
    ]


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.get(name).weights is None])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("saliency", [[1.0] * 6] * 4),
        ("seconds", [0, 1, 2, 3]),
        ("grid", (4, 2, 3)),
        ("frame_features", "mean"),
        ("text_after", 5),
        ("policy", "a/directory"),
        ("weights", "a/directory"),
    ],
)
def test_side_inputs_of_another_type_are_named(method: str, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a .* or None, got {type(value).__name__}$"):
        select_tokens(torch.zeros(4, 6, 8), 0.5, method=method, **{name: value})


@pytest.mark.parametrize("seed", [None, "x", 1.5, 2**64])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises((TypeError, ValueError), match="option 'seed' of method 'random' must be an integer"):
        select_tokens(torch.zeros(4, 6, 8), 0.5, method="random", seed=seed)
