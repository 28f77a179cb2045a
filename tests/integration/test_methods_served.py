"""Every method through the served path: selected or merged rows, exact counts, exact positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from score_vllm import RetentionPolicy, methods, num_retained_tokens, select_tokens
from score_vllm.methods.visionselector_weights import SelectorWeights
from score_vllm.vision.tower import VisionTower
from tests.explained import explained

from .conftest import SERVED, Engine, make_video
from .oracle import VisualItem, greedy
from .test_oracle import TOKENS_PER_SECOND, VIDEO, check, expected_geometry, generate


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.mark.parametrize("ratio", [1.0, 0.4, 0.1])
@pytest.mark.parametrize("method", SERVED)
def test_oracle_holds_for_every_method(
    method: str, ratio: float, engine: Engine, reference: Any, tiny_model: Path, tiny_policy: Path, tiny_selector: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    seed = 20_000 + 100 * methods.names().index(method) + int(10 * ratio)
    video = make_video(24, 84, 112, seed=seed, seconds_per_cell=1.7)
    prompt = f"Before {VIDEO} after, long enough to be cut."
    engine.clear()
    output = generate(engine, prompt, [video], ratio=ratio, method=method)
    ((x, layout, num_retained),) = engine.compressed
    grid, (_, t_factor) = layout.grid, expected_geometry(video)
    assert num_retained == num_retained_tokens(grid.num_tokens, ratio)
    kept = select_tokens(
        x.view(grid.t, grid.tokens_per_frame, -1),
        ratio,
        method=method,
        policy=RetentionPolicy.from_pretrained(tiny_policy) if method == "score" else None,
        saliency=engine.saliency[0],
        weights=SelectorWeights.from_pretrained(str(tiny_selector)),
        grid=grid,
        seconds=torch.from_numpy(layout.cells[:, 1] / TOKENS_PER_SECOND),
    )
    assert engine.llm.collective_rpc("score_selections", args=(engine.keys,)) == [[explained(kept.indices, grid)]]
    item = VisualItem(x, (grid.t, grid.h, grid.w), t_factor, kept.indices, kept.embeddings)
    video_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    parts: list[Any] = [item if token == video_id else token for token in tokenizer(prompt).input_ids]
    check(output, *greedy(reference, parts, 8))


def test_methods_never_share_cache_entries(engine: Engine) -> None:
    video = make_video(8, 84, 84, seed=30_000)
    engine.clear()
    for number, method in enumerate(SERVED, start=1):
        output = generate(engine, f"{VIDEO}Which?", [video], ratio=0.4, num_tokens=1, method=method)
        assert len(engine.compressed) == number
        assert output.num_cached_tokens <= 1


@pytest.mark.parametrize("bad", ["magic", "", 3, ["evs"]])
def test_unknown_method_is_refused(bad: Any, engine: Engine) -> None:
    with pytest.raises(ValueError, match="retention_method must be one of"):
        generate(engine, f"{VIDEO}?", [make_video(8, 56, 56, seed=1)], method=bad, num_tokens=1)


def embedded_video(tiny_model: Path) -> dict[str, torch.Tensor]:
    """Rows that a client computed: 3 cells of 2 x 4 tokens."""
    width = AutoConfig.from_pretrained(tiny_model).get_text_config().hidden_size
    rows = torch.randn(24, width, generator=torch.Generator().manual_seed(5))
    return {"video_embeds": rows, "video_grid_thw": torch.tensor([[3, 4, 8]])}


def test_embeddings_of_videos_are_compressed(engine: Engine, tiny_model: Path) -> None:
    engine.clear()
    video = embedded_video(tiny_model)
    output = generate(engine, f"{VIDEO}?", video, ratio=0.5, method="vidcom2", num_tokens=1)
    ((x, layout, kept),) = engine.compressed
    torch.testing.assert_close(x, video["video_embeds"], atol=0, rtol=0)
    assert (layout.grid.t, layout.grid.h, layout.grid.w, kept) == (3, 2, 4, 12)
    assert len(output.outputs[0].token_ids) == 1


@pytest.mark.parametrize("method", [name for name in SERVED if methods.get(name).saliency])
def test_embeddings_have_no_attention_to_rank_by(method: str, engine: Engine, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=f"retention_method '{method}' ranks by .* ask for one of .*'vidcom2'"):
        generate(engine, f"{VIDEO}?", embedded_video(tiny_model), method=method, num_tokens=1)


@pytest.mark.parametrize(("method", "kind"), [("fastvid", "frame"), ("flashvid", "patch")])
def test_saliency_is_the_last_blocks_attention(
    method: str, kind: str, engine: Engine, reference: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook's numbers from transformers' own tower, one frame, head and unit at a time."""
    from transformers import AutoProcessor
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    frames, metadata = make_video(8, 140, 196, seed=31_000)
    engine.clear()
    generate(engine, f"{VIDEO}?", [(frames, metadata)], ratio=0.5, num_tokens=1, method=method)
    processor = AutoProcessor.from_pretrained(tiny_model).video_processor
    inputs = processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    visual = reference.model.visual
    captured: dict[str, Any] = {}
    original = modeling.apply_rotary_pos_emb_vision

    def spy(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        captured["qk"] = original(q, k, cos, sin)
        return captured["qk"]

    def spy_windows(tokens: torch.Tensor, window_index: torch.Tensor, seq_len: int) -> torch.Tensor:
        captured["windows"] = window_index
        return type(visual).permute_input_for_window_attn(visual, tokens, window_index, seq_len)

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb_vision", spy)
    monkeypatch.setattr(visual, "permute_input_for_window_attn", spy_windows)
    with torch.no_grad():
        visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    query, key = captured["qk"]  # the last block called it last; [S, H, d], window order
    t, h, w = (int(n) for n in inputs["video_grid_thw"][0])
    per_frame = h * w
    window_index = captured["windows"]
    expected = torch.empty(t * per_frame // 4)
    for frame in range(t):
        rows = slice(frame * per_frame, (frame + 1) * per_frame)
        total = torch.zeros(per_frame // 4)
        for head in range(query.shape[1]):
            scale = query.shape[-1] ** 0.5
            if kind == "patch":
                attention = (query[rows, head] @ key[rows, head].T / scale).softmax(-1)
                total += attention.mean(0).reshape(-1, 4).mean(1)
                continue
            mean_query = query[rows, head].mean(0)
            units = key[rows, head].reshape(per_frame // 4, 4, -1).mean(1)
            total += (units @ mean_query / scale).softmax(0)
        expected[window_index[frame * per_frame // 4 : (frame + 1) * per_frame // 4]] = total / query.shape[1]
    torch.testing.assert_close(engine.saliency[0].flatten(), expected, atol=1e-5, rtol=1e-4)
    assert engine.saliency[0].sum(1) == pytest.approx([0.25 if kind == "patch" else 1.0] * t, abs=1e-5)
    # Pictures and accuracy tables take it from transformers.
    _, _, ours = VisionTower(tiny_model).encode_with_saliency(frames)
    torch.testing.assert_close(ours[kind].flatten(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["score", "evs"])
def test_nan_features_are_counted_and_do_not_end_the_engine(
    method: str, tiny_policy: Path, caplog: pytest.LogCaptureFixture, engine: Engine
) -> None:
    from score_vllm.layout import grid_layout
    from score_vllm.types import VideoGrid

    compressor = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.compressor
    before = compressor.stats.nan_videos
    x = torch.randn(4 * 6, 128)
    x[7] = float("nan")
    rows = type(compressor).compress(compressor, x, grid_layout(VideoGrid(4, 2, 3), 1.0), 5, method)
    assert rows.shape == (5, 128 + 9)
    assert compressor.stats.nan_videos == before + 1
    assert "scores are NaN" in caplog.text
