"""What ``exact`` mode promises of every method: count, order, determinism, and no video too short or too still."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from score_vllm import TokenSelection, methods, num_retained_tokens, select_tokens
from score_vllm.methods import common as shared
from score_vllm.methods import merging
from score_vllm.methods.cacovid_weights import CacovidWeights
from score_vllm.methods.visionselector_weights import SelectorWeights
from score_vllm.select import select_retained

LEARNED = ("visionselector", "cacovid")
PUBLISHED = ("evs", "vidcom2", "fastvid", "holitom", "dycoke", "vcast", "tango", "flashvid", *LEARNED)
SELECTING = ("evs", "vidcom2", "dycoke", "vcast", *LEARNED, "uniform", "random")
CALLS: list[tuple[str, str | None]] = [
    (name, variant) for name in (*PUBLISHED, "uniform", "random") for variant in (methods.get(name).variants or (None,))
]
videos = st.tuples(
    st.integers(1, 17),  # T
    st.integers(1, 20),  # N
    st.integers(1, 12),  # D
    st.sampled_from(["noise", "scenes", "still", "constant", "zero", "rows"]),
    st.integers(0, 2**31 - 1),
)
ratios = st.one_of(st.sampled_from([1e-6, 0.1, 0.25, 0.29, 0.4, 0.5, 0.75, 0.999, 1.0]), st.floats(1e-4, 1.0))
common = settings(max_examples=40, derandomize=True)


def make_video(frames: int, per_frame: int, d: int, kind: str, seed: int) -> torch.Tensor:
    """[T, N, D] fp32 tokens of one kind of video."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    still = noise(per_frame, d).expand(frames, per_frame, d)
    return {
        "noise": lambda: noise(frames, per_frame, d),
        "scenes": lambda: (
            (noise(-(-frames // 4), per_frame, d).repeat_interleave(4, 0)[:frames]) + 0.3 * noise(frames, per_frame, d)
        ),
        "still": lambda: still + 0.05 * noise(frames, per_frame, d),
        "constant": lambda: still.clone(),
        "zero": lambda: torch.zeros(frames, per_frame, d),
        # Equal tokens inside a frame: every choice there is a tie.
        "rows": lambda: noise(frames, 1, d).expand(frames, per_frame, d).clone(),
    }[kind]()


def video_for(method: str, video: Any) -> torch.Tensor:
    """:func:`make_video`, of an even width where the method's weights come in no other."""
    frames, per_frame, d, kind, seed = video
    return make_video(frames, per_frame, d + d % 2 if method in LEARNED else d, kind, seed)


def weights_for(method: str, d: int) -> Any:
    """Random weights of a learned method, which come in even widths only; None for the others."""
    return (
        {"visionselector": SelectorWeights, "cacovid": CacovidWeights}[method].random(d) if method in LEARNED else None
    )


def select(x: torch.Tensor, ratio: float, method: str, **keywords: Any) -> TokenSelection:
    """:func:`select_tokens`, with weights where the method needs some."""
    return select_tokens(x, ratio, method=method, weights=weights_for(method, x.shape[-1]), **keywords)


def same(a: TokenSelection, b: TokenSelection) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.embeddings, b.embeddings)


@pytest.mark.parametrize(("method", "variant"), CALLS)
@given(video=videos, ratio=ratios)
@common
def test_count_order_and_determinism(method: str, variant: str | None, video: Any, ratio: float) -> None:
    x = video_for(method, video)
    got = select(x, ratio, method=method, variant=variant)
    assert got.num_retained == num_retained_tokens(x.shape[0] * x.shape[1], ratio)
    assert bool((got.indices[1:] > got.indices[:-1]).all())
    assert int(got.indices[0]) >= 0
    assert int(got.indices[-1]) < x.shape[0] * x.shape[1]
    assert got.embeddings.dtype == x.dtype
    assert bool(got.embeddings.isfinite().all())
    torch.manual_seed(video[4] % 97)  # the global generator must not matter
    assert same(got, select(x, ratio, method=method, variant=variant))
    if method in SELECTING:
        assert torch.equal(got.embeddings, x.reshape(-1, x.shape[2])[got.indices])


@pytest.mark.parametrize("method", ["fastvid", "holitom", "dycoke", "vcast", "tango", "flashvid", "cacovid"])
@given(video=videos, ratio=ratios, data=st.data())
@common
def test_every_mask_has_as_many_tokens_as_the_plan_says(method: str, video: Any, ratio: float, data: Any) -> None:
    # masked_indices is told the number, so that no sync is needed; a wrong one would go unseen.
    def checked(mask: torch.Tensor, count: int) -> torch.Tensor:
        assert int(mask.sum()) == count
        return shared.masked_indices(mask, count)

    variant = data.draw(st.sampled_from(methods.get(method).variants or (None,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"score_vllm.methods.{method}.masked_indices", checked)
        select(video_for(method, video), ratio, method=method, variant=variant)


@pytest.mark.parametrize(("method", "variant"), CALLS)
@given(video=videos, with_saliency=st.booleans())
@common
def test_ratio_one_returns_everything_unchanged(
    method: str, variant: str | None, video: Any, with_saliency: bool
) -> None:
    x = video_for(method, video).bfloat16()
    saliency = torch.rand(x.shape[:2]) if with_saliency else None
    got = select(x, 1.0, method=method, variant=variant, saliency=saliency)
    assert torch.equal(got.indices, torch.arange(x.shape[0] * x.shape[1]))
    assert torch.equal(got.embeddings, x.reshape(-1, x.shape[2]))


@pytest.mark.parametrize("method", PUBLISHED)
@given(first=videos, second=videos, ratio=ratios)
@common
def test_order_of_a_batch_does_not_matter(method: str, first: Any, second: Any, ratio: float) -> None:
    x, y = video_for(method, first), video_for(method, second)
    forward = [select(video, ratio, method=method) for video in (x, y)]
    backward = [select(video, ratio, method=method) for video in (y, x)][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))


@pytest.mark.parametrize("method", ["fastvid", "holitom", "tango", "flashvid"])
@given(video=videos, ratio=ratios, seed=st.integers(0, 1000))
@common
def test_merged_rows_stay_inside_what_they_merge(method: str, video: Any, ratio: float, seed: int) -> None:
    x = video_for(method, video)
    saliency = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed))
    got = select(x, ratio, method=method, saliency=saliency)
    # Merging is a weighted mean, so no channel leaves the range that the video has.
    flat = x.reshape(-1, x.shape[2])
    assert bool((got.embeddings <= flat.amax(0) + 1e-4).all())
    assert bool((got.embeddings >= flat.amin(0) - 1e-4).all())


@pytest.mark.parametrize(("method", "variant"), CALLS)
@given(video=videos, ratio=ratios)
@common
def test_selecting_does_not_depend_on_the_size_of_blocks(
    method: str, variant: str | None, video: Any, ratio: float
) -> None:
    x = video_for(method, video)
    whole = select(x, ratio, method=method, variant=variant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score_vllm.methods.common._BLOCK_TOKENS_CPU", 7)
        patch.setattr("score_vllm.methods.merging._BLOCK_ELEMENTS_CPU", 11)
        blocks = select(x, ratio, method=method, variant=variant)
    assert blocks.num_retained == whole.num_retained
    # Elsewhere rounding decides between ties. HoliTom has some by construction: with two centres, two tokens
    # that are each other's nearest are equally dense, exactly so only where a frame fits one block.
    if video[3] in ("noise", "scenes") and x.shape[2] > 3 and method != "holitom":
        assert torch.equal(blocks.indices, whole.indices)
        torch.testing.assert_close(blocks.embeddings, whole.embeddings, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_are_made_in_fp32(method: str, dtype: torch.dtype) -> None:
    x = make_video(12, 16, 8, "scenes", 1).to(dtype)
    narrow, wide = (select(v, 0.3, method=method) for v in (x, x.float()))
    assert torch.equal(narrow.indices, wide.indices)
    assert torch.equal(narrow.embeddings, wide.embeddings.to(dtype))


@pytest.mark.parametrize("method", ["evs", "vidcom2", "dycoke", "visionselector", "uniform", "random"])
def test_methods_that_do_not_sync_the_host(method: str) -> None:
    # A fake tensor has no values: reading one on the host (item, nonzero, bool, tolist) raises.
    with FakeTensorMode():
        x = torch.empty(9, 12, 8)
        weights = weights_for(method, 8)
        for keep in (1, 11, 12, 40, 107, 108):
            selection, has_nan = select_retained(x, keep, method, weights=weights)
            assert selection.embeddings.shape == (keep, 8)
            assert has_nan.shape == ()


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("frame", [0, 5])
def test_broken_input_is_refused(method: str, broken: float, frame: int) -> None:
    x = make_video(9, 12, 8, "noise", 0)
    x[frame, 3, 2] = broken
    for ratio in (0.1, 0.5):
        with pytest.raises(ValueError, match=f"'{method}' gave NaN scores"):
            select(x, ratio, method=method)


@pytest.mark.parametrize("method", ["fastvid", "holitom", "tango", "flashvid"])
def test_broken_saliency_is_refused(method: str) -> None:
    x = make_video(9, 12, 8, "noise", 0)
    saliency = torch.rand(9, 12)
    saliency[4, 4] = -torch.inf
    with pytest.raises(ValueError, match="saliency has NaN"):
        select(x, 0.3, method=method, saliency=saliency)


def test_evs_below_one_frame_spreads_over_the_first() -> None:
    x = make_video(8, 20, 6, "scenes", 3)
    assert select_tokens(x, 0.05, method="evs").indices.tolist() == [1, 3, 6, 8, 11, 13, 16, 18]
    assert select_tokens(x, 0.125, method="evs").indices.tolist() == list(range(20))


def test_evs_keeps_what_changed() -> None:
    x = make_video(4, 10, 6, "constant", 5)
    x[2, 7] = -x[2, 7]  # changes, and changes back in frame 3
    assert select_tokens(x, 0.3, method="evs").indices.tolist() == [*range(10), 27, 37]


def test_vidcom2_gives_more_to_the_frame_that_differs() -> None:
    x = make_video(8, 20, 16, "still", 5)
    x[3] = make_video(1, 20, 16, "noise", 6)[0]
    kept = select_tokens(x, 0.25, method="vidcom2").kept_per_frame()
    assert int(kept.argmax()) == 3
    assert int(kept[3]) > 2 * int(kept[0])


def test_dycoke_keeps_the_first_of_every_four_frames_whole() -> None:
    kept = select_tokens(make_video(8, 20, 6, "noise", 3), 0.4, method="dycoke").kept_per_frame()
    assert kept.tolist() == [20, 4, 4, 4, 20, 4, 4, 4]


def test_dycoke_below_a_quarter_thins_the_first_frames() -> None:
    x = make_video(8, 20, 6, "constant", 3)
    x[4, 11] = -x[4, 11]
    got = select_tokens(x, 0.1, method="dycoke")
    assert got.kept_per_frame().tolist() == [8, 0, 0, 0, 8, 0, 0, 0]
    assert 4 * 20 + 11 in got.indices.tolist()
    assert got.indices[:8].tolist() == [1, 3, 6, 8, 11, 13, 16, 18]


def test_fastvid_keeps_salient_rows_raw_and_merges_the_context() -> None:
    x = make_video(8, 20, 6, "scenes", 3)
    saliency = torch.zeros(8, 20)
    saliency[:, 4] = 1.0
    got = select_tokens(x, 0.25, method="fastvid", saliency=saliency, c=2, tau=-1.0)
    raw = x.reshape(-1, 6)[got.indices]
    unchanged = (got.embeddings == raw).all(-1)
    assert not unchanged.all()
    salient = saliency.flatten()[got.indices] > 0
    assert salient.any()
    assert unchanged[salient].all()


def test_fastvid_uses_the_frame_features_given() -> None:
    x = make_video(12, 10, 6, "noise", 3)
    features = torch.eye(2)[[0] * 5 + [1] * 7]
    plain = select_tokens(x, 0.3, method="fastvid", c=1, tau=0.5)
    cut = select_tokens(x, 0.3, method="fastvid", c=1, tau=0.5, frame_features=features)
    assert plain.kept_per_frame().tolist() != cut.kept_per_frame().tolist()
    # Two segments; each keeps its share in the frame that ends it, then by saliency.
    assert int(cut.kept_per_frame()[:5].sum()) == 36 * 5 // 12


def test_holitom_merges_static_places_into_the_first_frame() -> None:
    x = make_video(6, 10, 6, "constant", 3)
    x[:, :3] = make_video(6, 3, 6, "noise", 4)  # three places move
    got = select_tokens(x, 0.3, method="holitom", saliency=torch.rand(6, 10))
    static = got.indices[got.indices % 10 >= 3]
    assert len(static)
    assert int(static.max()) < 10


def test_holitom_saturated_keeps_static_tokens_of_later_frames() -> None:
    x = make_video(6, 10, 6, "constant", 3)
    saliency = torch.zeros(6, 10)
    saliency[3] = 1.0
    kept = select_tokens(x, 0.3, method="holitom", saliency=saliency).kept_per_frame()
    assert kept.tolist() == [10, 0, 0, 8, 0, 0]


def test_density_peaks_against_their_definition() -> None:
    x = make_video(3, 9, 4, "noise", 2)
    valid = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    frames = torch.tensor([2, 0])
    got = merging.density_peaks(x, frames, valid, 4)
    for row, t in enumerate(frames.tolist()):
        inside = valid[row].nonzero()[:, 0].tolist()
        distance = {(i, j): float((x[t, i] - x[t, j]).norm()) / 4**0.5 for i in inside for j in inside}
        density = {
            i: math.exp(-sum(sorted(distance[i, j] ** 2 for j in inside)[:4]) / min(4, len(inside))) for i in inside
        }
        farthest = max(distance.values())
        for i in range(9):
            if i not in inside:
                assert got[row, i] == -torch.inf
                continue
            delta = min(distance[i, j] if density[j] > density[i] else farthest for j in inside)
            assert float(got[row, i]) == pytest.approx(density[i] * delta, rel=1e-4)


def test_of_two_equally_dense_tokens_the_first_is_the_peak() -> None:
    # With two neighbours, 1 and 3 are each other's nearest: equally dense, and only one may be a peak.
    x = torch.tensor([[[9.0, 0.0], [0.1, 0.3], [-7.0, 5.0], [0.3, 0.2]]])
    peaks = merging.density_peaks(x, torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool), 2)[0]
    assert int(peaks.argmax()) == 1
    assert float(peaks[3]) < 0.05 * float(peaks[1])


@pytest.mark.parametrize("method", ["fastvid", "holitom", "tango", "flashvid"])
def test_the_stand_in_saliency_is_said_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    shared._warn_about_stand_in.cache_clear()
    x = make_video(8, 6, 4, "noise", 0)
    select_tokens(x, 0.5, method=method, saliency=torch.rand(8, 6))
    assert not caplog.records
    norm = select_tokens(x, 0.5, method=method)
    select_tokens(x, 0.5, method=method)
    assert [("NOT the published method" in r.message, method in r.message) for r in caplog.records] == [(True, True)]
    assert same(norm, select_tokens(x, 0.5, method=method, saliency=x.norm(dim=-1)))
    assert methods.get(method).saliency
