"""vLLM's outputs equal transformers' on the kept rows at their original positions: guards everything that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from score_vllm import RetentionPolicy, num_retained_tokens, select_tokens

vllm = pytest.importorskip("vllm")
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from .conftest import CHUNK, Engine, make_video  # noqa: E402
from .oracle import VisualItem, greedy  # noqa: E402
from .warm_cells import check_warm_cells, forget_answers  # noqa: E402

VIDEO, IMAGE = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TOKENS_PER_SECOND = 2


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def generate(
    engine: Engine,
    prompt: str | list[int],
    videos: Any = None,
    images: list[Any] | None = None,
    ratio: Any = None,
    num_tokens: int = 8,
    method: Any = None,
) -> Any:
    data: dict[str, Any] = {}
    if videos:
        data["video"] = videos
    if images:
        data["image"] = images
    request: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if data:
        request["multi_modal_data"] = data
    asked = {"retention_ratio": ratio, "retention_method": method}
    request["mm_processor_kwargs"] = {key: value for key, value in asked.items() if value is not None}
    params = SamplingParams(max_tokens=num_tokens, temperature=0, logprobs=-1, ignore_eos=True)
    (output,) = engine.llm.generate([request], params, use_tqdm=False)
    return output


def expected_geometry(video: Any) -> tuple[tuple[int, int, int], float]:
    """Token grid and positions per cell of a video, from its frames and metadata alone, not from the engine."""
    frames, metadata = video
    count, height, width, _ = frames.shape
    assert height % 28 == 0
    assert width % 28 == 0, "sizes that the processor does not resize"
    seconds = float(np.float32(2.0 / metadata["fps"]))  # vLLM keeps it in the model's dtype, fp32 in these tests
    return ((count + 1) // 2, height // 28, width // 28), seconds * TOKENS_PER_SECOND


def oracle_prompt(
    tokenizer: Any, prompt: str, engine: Engine, given: list[Any], ratios: list[float], policy: RetentionPolicy
) -> list[int | VisualItem]:
    """The same prompt for the oracle, with features captured from the engine and selection by the library."""
    videos, images = iter(zip(engine.compressed, given, ratios, strict=True)), iter(engine.images)
    parts: list[int | VisualItem] = []
    for token in tokenizer(prompt).input_ids:
        if token == tokenizer.convert_tokens_to_ids("<|video_pad|>"):
            (x, *_), video, ratio = next(videos)
            (t, h, w), t_factor = expected_geometry(video)
            kept = select_tokens(x.view(t, h * w, -1), ratio, policy=policy).indices
            assert len(kept) == num_retained_tokens(t * h * w, ratio)
            parts.append(VisualItem(x, (t, h, w), t_factor, kept))
        elif token == tokenizer.convert_tokens_to_ids("<|image_pad|>"):
            rows = next(images)
            side = int(len(rows) ** 0.5)
            assert side * side == len(rows), "the tests use square images"
            parts.append(VisualItem(rows, (1, side, side), 1.0, torch.arange(len(rows))))
        else:
            parts.append(token)
    return parts


def check(output: Any, first: torch.Tensor, generated: list[int]) -> None:
    ours = output.outputs[0]
    logprobs = torch.tensor([ours.logprobs[0][i].logprob for i in range(len(first))])
    torch.testing.assert_close(logprobs, first, atol=1e-4, rtol=0)
    assert list(ours.token_ids) == generated


SQUARE_IMAGE = np.random.default_rng(7).integers(0, 256, (84, 84, 3), dtype=np.uint8)

CASES: dict[str, tuple[str, list[dict[str, Any]], int, list[float] | None]] = {
    # prompt, videos, images, per-video ratios (None: run at 1.0, 0.4 and 0.1)
    "one video": (
        SYSTEM + f"<|im_start|>user\n{VIDEO}What happens?<|im_end|>\n<|im_start|>assistant\n",
        [{"num_frames": 16, "height": 84, "width": 112}],
        0,
        None,
    ),
    "video first": (f"{VIDEO}What?", [{"num_frames": 12, "height": 84, "width": 84}], 0, None),
    "video token at slot 0": ("<|video_pad|>What?", [{"num_frames": 12, "height": 84, "width": 84}], 0, None),
    "text video text": (
        f"First some text. {VIDEO} And a lot more text after it, longer than one chunk of the prefill.",
        [{"num_frames": 10, "height": 112, "width": 56}],
        0,
        None,
    ),
    "video at the end": (
        f"Look: {VIDEO}"[: -len("<|vision_end|>")],
        [{"num_frames": 10, "height": 84, "width": 84}],
        0,
        None,
    ),
    "two videos, two ratios": (
        f"A {VIDEO} and B {VIDEO}: compare.",
        [{"num_frames": 12, "height": 84, "width": 84}, {"num_frames": 8, "height": 56, "width": 140}],
        0,
        [0.4, 0.1],
    ),
    "image before and after": (
        f"{IMAGE} then {VIDEO} then {IMAGE} end.",
        [{"num_frames": 12, "height": 84, "width": 84}],
        2,
        None,
    ),
    "half a second per cell": (
        f"Q {VIDEO} A",
        [{"num_frames": 20, "height": 84, "width": 84, "seconds_per_cell": 0.5}],
        0,
        None,
    ),
    "fractional positions": (
        f"Q {VIDEO} A",
        [{"num_frames": 20, "height": 84, "width": 84, "seconds_per_cell": 0.35}],
        0,
        None,
    ),
    "56 seconds per cell, ids beyond 4096": (
        f"Q {VIDEO} A",
        [{"num_frames": 80, "height": 56, "width": 84, "seconds_per_cell": 56.0}],
        0,
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_oracle(
    name: str, engine: Engine, reference: Any, tokenizer: Any, tiny_policy: Path, request: pytest.FixtureRequest
) -> None:
    prompt, sizes, num_images, per_video = CASES[name]
    policy = RetentionPolicy.from_pretrained(tiny_policy)
    for run, ratio in enumerate([per_video] if per_video else [1.0, 0.4, 0.1]):
        seed = 1000 * list(CASES).index(name) + 10 * run
        videos = [make_video(seed=seed + i, **size) for i, size in enumerate(sizes)]
        images = [np.roll(SQUARE_IMAGE, seed + i, axis=0) for i in range(num_images)]
        engine.clear()
        output = generate(engine, prompt, videos, images, ratio)
        ratios = per_video or [ratio] * len(videos)
        kept = sum(
            num_retained_tokens(layout.grid.num_tokens, r)
            for (_, layout, _), r in zip(engine.compressed, ratios, strict=True)
        )
        video_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        assert list(output.prompt_token_ids).count(video_id) == kept
        first, generated = greedy(reference, oracle_prompt(tokenizer, prompt, engine, videos, ratios, policy), 8)
        check(output, first, generated)
        if "4096" in name:
            assert max(int(p.max()) for p in engine.positions) > 4096


def test_every_chunk_boundary(engine: Engine, reference: Any, tokenizer: Any, tiny_policy: Path) -> None:
    """The video slides by one token through the prefill chunks: each of its slots becomes a boundary once."""
    policy = RetentionPolicy.from_pretrained(tiny_policy)
    for shift in range(CHUNK):
        prompt = "x" * shift + f"{VIDEO}?"
        video = make_video(8, 84, 84, seed=5000 + shift)
        engine.clear()
        output = generate(engine, prompt, [video], ratio=0.6, num_tokens=2)
        assert engine.compressed[0][2] > CHUNK, "the kept video must be longer than a chunk"
        first, generated = greedy(reference, oracle_prompt(tokenizer, prompt, engine, [video], [0.6], policy), 2)
        check(output, first, generated)


def test_second_turn_hits_the_prefix_cache(engine: Engine, reference: Any, tokenizer: Any, tiny_policy: Path) -> None:
    policy = RetentionPolicy.from_pretrained(tiny_policy)
    video = make_video(16, 84, 112, seed=6000)
    opening = f"<|im_start|>user\n{VIDEO}What happens?<|im_end|>\n<|im_start|>assistant\n"
    engine.clear()
    answer = generate(engine, opening, [video], ratio=0.4).outputs[0].text
    second = opening + answer + "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    output = generate(engine, second, [video], ratio=0.4)
    retained = engine.compressed[0][2]
    assert output.num_cached_tokens > retained, "the whole video must come from the prefix cache"
    assert len(engine.compressed) == 1, "the video must not be encoded again"
    first, generated = greedy(reference, oracle_prompt(tokenizer, second, engine, [video], [0.4], policy), 8)
    check(output, first, generated)


def test_ratios_never_share_cache_entries(engine: Engine) -> None:
    """The same video at another ratio is another item; 1 and 1.0 are the same."""
    video = make_video(32, 84, 84, seed=7000)  # 144 tokens: at 0.25 more than a block of the prefix cache
    prompt = f"{VIDEO}Which?"
    engine.clear()
    counts = [len(generate(engine, prompt, [video], ratio=r, num_tokens=1).prompt_token_ids) for r in (0.4, 0.35, 1)]
    assert len(set(counts)) == 3
    assert len(engine.compressed) == 3
    again = generate(engine, prompt, [video], ratio=1.0, num_tokens=1)
    assert len(engine.compressed) == 3, "1 and 1.0 must share an entry"
    assert again.num_cached_tokens > 0
    fresh = generate(engine, prompt, [video], ratio=0.3, num_tokens=1)
    assert len(fresh.prompt_token_ids) > 32, "long enough to fill a block that could be shared"
    assert fresh.num_cached_tokens == 0, "a new ratio must not find another ratio's video in the prefix cache"


def test_no_cell_is_encoded_twice(
    engine: Engine, reference: Any, tokenizer: Any, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tower with attention within windows."""
    policy = RetentionPolicy.from_pretrained(tiny_policy)
    prompt = f"Again {VIDEO} and again."
    frames, metadata = make_video(26, 140, 196, seed=8100)

    def ask(parts: np.ndarray, ratio: float, method: str | None) -> tuple[torch.Tensor, list[int]]:
        videos = [(parts, {**metadata, "total_num_frames": len(parts), "frames_indices": list(range(len(parts)))})]
        engine.clear()
        output = generate(engine, prompt, videos, ratio=ratio, method=method)
        if method is None:
            parts_of = oracle_prompt(tokenizer, prompt, engine, videos, [ratio], policy)
            check(output, *greedy(reference, parts_of, 8))
        ((x, _, _),) = engine.compressed
        return x.clone(), list(output.outputs[0].token_ids)

    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    check_warm_cells(ask, engine.llm, model, frames, 2, monkeypatch)


def test_with_the_encoder_in_data_parallel_mode_an_item_is_a_cell(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the ranks share one video; here there is one rank."""
    from vllm.model_executor.models import qwen2_5_vl

    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    video = make_video(12, 84, 112, seed=8200)
    engine.clear()
    expected = generate(engine, f"{VIDEO}?", [video], ratio=0.4).outputs[0].token_ids
    ((rows, _, _),) = list(engine.compressed)
    forget_answers(engine.llm)
    model.compressor.cells.clear()
    shard, grids = qwen2_5_vl.run_dp_sharded_mrope_vision_model, []

    def spy(visual: Any, pixels: Any, grid: Any, **options: Any) -> Any:
        grids.append(grid)
        return shard(visual, pixels, grid, **options)

    monkeypatch.setattr(qwen2_5_vl, "run_dp_sharded_mrope_vision_model", spy)
    monkeypatch.setattr(model, "use_data_parallel", True)
    engine.clear()
    output = generate(engine, f"{VIDEO}?", [video], ratio=0.4)
    assert grids == [[[1, 6, 8]] * 6]
    assert torch.equal(engine.compressed[0][0], rows)
    assert list(output.outputs[0].token_ids) == list(expected)


def test_decode_does_no_position_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the prompt is through, no step touches the offsets, unpacks digits or asks for positions."""
    from score_vllm.models import adapter

    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    steps: list[tuple[int, int]] = []
    unpacked = 0
    original = adapter.unpack_offsets

    def count(channels: torch.Tensor) -> torch.Tensor:
        nonlocal unpacked
        unpacked += 1
        return original(channels)

    monkeypatch.setattr(adapter, "unpack_offsets", count)
    inner = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        steps.append((kwargs["positions"].shape[-1], model._offset_rows))
        return inner(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    generate(engine, f"{VIDEO}Count.", [make_video(8, 84, 84, seed=8000)], ratio=0.5, num_tokens=8)
    decode = steps[-7:]
    assert all(rows == 0 for _, rows in decode)
    assert any(rows > 0 for _, rows in steps[:-7])
    in_prefill = unpacked
    assert 0 < in_prefill <= len(steps) - 7
    assert not model._position_offsets.any()


def test_literal_placeholder_in_text_does_not_shift_the_video(
    engine: Engine, reference: Any, tokenizer: Any, tiny_policy: Path
) -> None:
    """A client may write the placeholder itself; vLLM fills the first, and ours must stand exactly there."""
    policy = RetentionPolicy.from_pretrained(tiny_policy)
    prompt = f"{VIDEO}Say <|image_pad|> and go."
    engine.clear()
    output = generate(engine, prompt, [make_video(8, 84, 84, seed=8100)], ratio=0.4)
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    parts: list[Any] = []
    x, layout, _ = engine.compressed[0]
    grid, t_factor = layout.grid, 2.0
    for token in tokenizer(prompt).input_ids:
        if token == tokenizer.convert_tokens_to_ids("<|video_pad|>"):
            kept = select_tokens(x.view(grid.t, grid.h * grid.w, -1), 0.4, policy=policy).indices
            parts.append(VisualItem(x, (grid.t, grid.h, grid.w), t_factor, kept))
        else:
            parts.append(token)
    assert image_id in parts
    check(output, *greedy(reference, parts, 8))


@pytest.mark.parametrize("bad", [0, -0.1, 1.5, float("nan"), float("inf"), "0.5", True, [0.5, 0.5], []])
def test_bad_ratio_is_refused_and_the_next_request_works(engine: Engine, bad: Any) -> None:
    video = make_video(8, 56, 56, seed=9000)
    with pytest.raises((ValueError, TypeError), match="retention_ratio"):
        generate(engine, f"{VIDEO}?", [video], ratio=bad, num_tokens=1)
    assert len(generate(engine, f"{VIDEO}?", [video], ratio=0.5, num_tokens=1).outputs[0].token_ids) == 1


def test_absurd_duration_is_refused_before_the_engine(engine: Engine) -> None:
    """Positions beyond the rotary table would be read from outside of it, by the prompt or by a later token."""
    for seconds in (1e6, 21_200.0):
        video = make_video(8, 56, 56, seed=9100, seconds_per_cell=seconds)
        with pytest.raises(ValueError, match="positions"):
            generate(engine, f"{VIDEO}?", [video], ratio=0.5, num_tokens=1)


def test_decode_at_the_end_of_the_rotary_table(engine: Engine) -> None:
    """The longest video that is accepted, and the longest answer to it: no position leaves the table."""
    table = 4 * 32768
    room = table - 4096  # beside the longest text
    seconds = (room - 1) / 2 / 3  # the fourth cell is the last: its offset is 3 * 2 * seconds
    engine.clear()
    video = make_video(8, 56, 56, seed=9150, seconds_per_cell=seconds)
    output = generate(engine, f"{VIDEO}?", [video], ratio=0.5, num_tokens=40)
    assert len(output.outputs[0].token_ids) == 40
    highest = max(int(p.max()) for p in engine.positions)
    assert room <= highest < table


def test_positions_are_changed_in_the_runners_own_buffer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piecewise CUDA graphs read the address that they were captured with: another tensor would be ignored."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.model
    inner, outer = model.language_model.model.forward, model.forward
    seen, offset_rows = [], []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["positions"].data_ptr())
        return inner(*args, **kwargs)

    def spy_outside(*args: Any, **kwargs: Any) -> Any:
        offset_rows.append(model._offset_rows)
        return outer(*args, **kwargs)

    monkeypatch.setattr(model.language_model.model, "forward", spy)
    monkeypatch.setattr(model, "forward", spy_outside)
    generate(engine, f"{VIDEO}Where?", [make_video(8, 84, 84, seed=9160)], ratio=0.5, num_tokens=2)
    assert any(offset_rows)
    assert set(seen) == {runner.mrope_positions.gpu.data_ptr()}


def test_two_policies_never_share_an_identity(tiny_model: Path, tmp_path: Path) -> None:
    """Also where nobody gave a digest: `vllm serve`, or the LLM class."""
    from score_vllm.config import ServingConfig

    for seed in (1, 2):
        RetentionPolicy(128, seed=seed).save_pretrained(tmp_path / str(seed))
    from types import SimpleNamespace

    from score_vllm.models.processing import CompressionProcessorMixin

    keys = set()
    for seed in (1, 2):
        serving = ServingConfig(0.1, "score", policy=str(tmp_path / str(seed)))
        vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
        config = SimpleNamespace(vision_config=vision, score=serving.to_overrides()["score"])
        model_config = SimpleNamespace(max_model_len=10, hf_text_config=SimpleNamespace(max_position_embeddings=10))
        info = SimpleNamespace(
            get_hf_config=lambda config=config: config,
            get_tokenizer=lambda: SimpleNamespace(get_vocab=lambda: {"v": 1}),
            ctx=SimpleNamespace(model_config=model_config),
        )
        processor = CompressionProcessorMixin()
        processor.info = info  # type: ignore[attr-defined]
        processor._setup_compression("v")
        assert processor.serving is not None
        keys.add(processor.serving.cache_key(0.1, "score"))
    assert len(keys) == 2


@pytest.mark.parametrize("size", [(84, 112), (100, 150)])
def test_vision_features_equal_transformers(
    size: tuple[int, int], engine: Engine, reference: Any, tiny_model: Path
) -> None:
    """From the same frames, resized or not, both preprocessors and towers give the same tokens (3e-6 apart here)."""
    from transformers import AutoProcessor

    frames, metadata = make_video(16, *size, seed=9200)
    engine.clear()
    generate(engine, f"{VIDEO}?", [(frames, metadata)], ratio=0.5, num_tokens=1)
    processor = AutoProcessor.from_pretrained(tiny_model).video_processor
    inputs = processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    with torch.no_grad():
        out = reference.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    torch.testing.assert_close(engine.compressed[0][0], out.pooler_output, atol=1e-4, rtol=0)


def test_positions_where_vllm_and_transformers_differ(reference: Any, engine: Engine) -> None:
    """transformers 5.19 lets text follow a video after max(h, w) positions, whatever its duration; vLLM goes on after
    the largest position. We follow vLLM; this test tells when transformers changes its mind."""
    from score_vllm.layout import grid_layout
    from score_vllm.positions import VisualSpan, prompt_positions
    from score_vllm.types import VideoGrid

    config = reference.config
    for cells, agree in ((3, True), (12, False)):
        ids = torch.tensor([[1, *[config.video_token_id] * (cells * 12), 2]])
        kinds = torch.tensor([[0, *[2] * (cells * 12), 0]])
        theirs, _ = reference.model.get_rope_index(
            ids, kinds, video_grid_thw=torch.tensor([[cells, 6, 8]]), second_per_grid_ts=torch.tensor([0.5])
        )
        span = VisualSpan.unpruned(1, grid_layout(VideoGrid(cells, 3, 4), 1.0))
        ours, _ = prompt_positions(ids.shape[1], [span])
        assert np.array_equal(ours[:, :-1], theirs[:, 0, :-1].numpy())
        assert (ours[0, -1] == theirs[0, 0, -1].item()) == agree


def test_the_served_path_runs_the_fused_call(engine: Engine) -> None:
    """One call scores, selects and gathers; on this device it is the blocked torch backend."""
    from score_vllm.kernels import ops

    ops._last.clear()
    generate(engine, f"{VIDEO}Which?", [make_video(8, 84, 84, seed=9300)], ratio=0.5, num_tokens=1)
    device = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.device
    expected = ops.backend_for(torch.empty(0, device=device))
    assert ops.last_backend("select_rows") == expected
    assert expected == ("triton" if device.type == "cuda" else "torch")
