"""Every family served exactly: one engine each, held to transformers' own model on the kept rows.

fp32 and 1e-4 on log-probabilities, 8 greedy tokens equal. Gated delta nets run in bf16 only on the CPU: there the
engine's own noise is measured in the same run, on prompts without video, and compressed prompts are held to it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")
from vllm import LLM, SamplingParams
from vllm.config import EncoderCacheManagerConfig

from score_vllm import RetentionPolicy, methods, num_retained_tokens, select_tokens
from score_vllm.catalog import UsageError
from score_vllm.config import ServingConfig
from score_vllm.methods.cacovid_weights import CacovidWeights
from score_vllm.models.worker import WORKER_EXTENSION
from score_vllm.plan import PLANNED
from score_vllm.plugin import ENCODER_CACHE_MANAGER
from score_vllm.vision.tower import VisionTower
from tests.explained import explained

from . import conftest as tier  # noqa: F401  (the environment of in-process engines)
from .capacity import check_capacity
from .family_oracle import Oracle, random_video
from .tiny_families import HIDDEN, build_llava, build_policy, build_qwen2_vl, build_qwen3
from .tiny_glm_internvl import GLM_TOKENS, build_glm, build_internvl
from .warm_cells import check_warm_cells

QWEN = "<|vision_start|><|{}_pad|><|vision_end|>"
LLAVA_VIDEO = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
RATIOS = (1.0, 0.4, 0.1, 0.02)
TRAINING_FREE = tuple(name for name in methods.names() if methods.get(name).weights is None)

_WEIGHTS = methods.get("cacovid").weights
assert _WEIGHTS is not None
CACOVID = _WEIGHTS.architectures


def write_cacovid(weights: CacovidWeights, directory: Path) -> str:
    """A checkpoint that holds the policy, in the published layout."""
    directory.mkdir()
    tensors = {f"compression_policy.{name}": tensor for name, tensor in weights.tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    heads = {"num_attention_heads": weights.heads, "num_key_value_heads": weights.kv_heads}
    (directory / "config.json").write_text(json.dumps({"text_config": heads}))
    return str(directory)


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint and what is said about it.

    Attributes:
        build: writes it.
        architecture: vLLM's and transformers' class.
        pixels: side of a token in pixels; 0: frames are resized to one size.
        image, video: placeholders in a prompt.
        structure: tokens per cell beside the vision tokens, at these lengths.
        options: of the engine.
    """

    build: Any
    architecture: str
    pixels: int
    image: str = QWEN.format("image")
    video: str = QWEN.format("video")
    options: dict[str, Any] = field(default_factory=dict)


LLAVA = partial(
    Family, architecture="LlavaOnevisionForConditionalGeneration", pixels=0, image="<image>", video="<video>"
)
GLM = {"pixels": 28, "image": "".join(GLM_TOKENS[:3]), "video": "".join(GLM_TOKENS[3:])}
FAMILIES = {
    "qwen3_vl": Family(partial(build_qwen3, kind="qwen3_vl"), "Qwen3VLForConditionalGeneration", 32),
    "llava_onevision": LLAVA(build_llava),
    "llava_video": LLAVA(partial(build_llava, **LLAVA_VIDEO)),
    "qwen2_vl": Family(build_qwen2_vl, "Qwen2VLForConditionalGeneration", 28),
    "qwen3_vl_moe": Family(partial(build_qwen3, kind="qwen3_vl_moe"), "Qwen3VLMoeForConditionalGeneration", 32),
    "qwen3_5": Family(
        partial(build_qwen3, kind="qwen3_5", dtype="bfloat16"),
        "Qwen3_5ForConditionalGeneration",
        32,
        options={"dtype": "bfloat16"},
    ),
    "qwen3_5_moe": Family(
        partial(build_qwen3, kind="qwen3_5_moe", dtype="bfloat16"),
        "Qwen3_5MoeForConditionalGeneration",
        32,
        options={"dtype": "bfloat16"},
    ),
    "glm4v_moe": Family(partial(build_glm, kind="glm4v_moe"), "Glm4vMoeForConditionalGeneration", **GLM),
    "glm4v": Family(build_glm, "Glm4vForConditionalGeneration", **GLM),
    "internvl": Family(
        build_internvl, "InternVLForConditionalGeneration", pixels=0, image="<IMG_CONTEXT>", video="<video>"
    ),
}


# Their dense relatives run in every test; score-serve runs them end to end.
RELATIVES = ("qwen3_5_moe", "glm4v_moe")


@dataclass
class Served:
    """A family's engine, its oracle, and what passed through its compressor."""

    name: str
    family: Family
    llm: Any
    oracle: Oracle
    policy: RetentionPolicy
    weights: CacovidWeights | None
    directory: Path
    compressed: list[tuple[torch.Tensor, Any, int]] = field(default_factory=list)
    saliency: list[Any] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    noise: float | None = None

    @property
    def exact(self) -> bool:
        return "dtype" not in self.family.options

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def video(self, num_frames: int, rows: int, columns: int, seed: int, fps: float = 2.0) -> Any:
        """A video of a token grid of rows x columns, where the family's grids follow the frames."""
        side = self.family.pixels or 32
        return random_video(num_frames, rows * side, columns * side, seed, fps)

    def generate(
        self, prompt: str, videos: Any = (), images: Any = (), ratio: Any = None, method: str | None = None, n: int = 8
    ) -> Any:
        self.compressed.clear()
        self.saliency.clear()
        self.images.clear()
        self.keys.clear()
        given = [frames if self.family.pixels == 0 else (frames, metadata) for frames, metadata in videos]
        data = {key: list(value) for key, value in (("video", given), ("image", images)) if len(value)}
        asked = {"retention_ratio": ratio, "retention_method": method}
        request = {
            "prompt": prompt,
            "multi_modal_data": data,
            "mm_processor_kwargs": {key: value for key, value in asked.items() if value is not None},
        }
        params = SamplingParams(max_tokens=n, temperature=0, logprobs=-1, ignore_eos=True)
        (output,) = self.llm.generate([request], params, use_tqdm=False)
        return output

    def check(
        self, output: Any, prompt: str, videos: Any, images: Any = (), ratio: Any = None, method: Any = None
    ) -> None:
        """The output equals the oracle's for the same prompt, with the tower's rows as the engine captured them."""
        ratios = ratio if isinstance(ratio, list) else [ratio] * len(videos)
        unpruned = self.oracle.unpruned(prompt, videos, images, self)
        kept, merged, masks = [], [], []
        for (x, layout, count), one, saliency in zip(self.compressed, ratios, self.saliency, strict=True):
            grid = layout.grid
            assert count == num_retained_tokens(grid.num_tokens, one)
            read = x[:, :HIDDEN].reshape(grid.t, grid.tokens_per_frame, HIDDEN)
            policy = self.policy if method in (None, "score") else None
            name = method or "score"
            variant = methods.variant_for(methods.get(name), self.family.architecture)
            weights = self.weights if name == "cacovid" else None
            rate = self.model.tokens_per_second
            chosen = select_tokens(
                read,
                one,
                method=name,
                policy=policy,
                saliency=saliency,
                variant=variant,
                grid=grid,
                seconds=torch.from_numpy(layout.cells[:, 1] / rate) if rate else None,
                weights=weights,
            )
            kept.append(chosen.indices)
            masks.append(explained(chosen.indices, grid))
            merged.append(torch.cat([chosen.embeddings, x[chosen.indices, HIDDEN:]], dim=1)[:, :HIDDEN])
        assert len(output.prompt_token_ids) == len(unpruned.vision) - sum(
            len(x) - count for x, _, count in self.compressed
        )
        assert self.llm.collective_rpc("score_selections", args=(self.keys,)) == [masks]
        self.compare(output, *self.oracle.greedy(unpruned, kept, len(output.outputs[0].token_ids), merged))

    def compare(self, output: Any, first: torch.Tensor, tokens: list[int], gaps: list[float]) -> None:
        ours = output.outputs[0]
        if self.exact:
            error = self.error(output, first)
            assert error <= self.tolerance, f"first token's log-probabilities differ by {error}"
            assert list(ours.token_ids) == tokens
            return
        assert self.noise is not None
        assert self.error(output, first) <= 2 * self.noise
        for mine, theirs, gap in zip(ours.token_ids, tokens, gaps, strict=True):
            if mine != theirs:
                assert gap <= 4 * self.noise, "only a tie within the noise may fall the other way"
                break

    @property
    def tolerance(self) -> float:
        # vLLM's CPU kernel of fused experts differs from transformers' by this, also where nothing is compressed.
        return 5e-3 if self.name.endswith("_moe") else 1e-4

    @staticmethod
    def error(output: Any, first: torch.Tensor) -> float:
        ours = output.outputs[0]
        return float((torch.tensor([ours.logprobs[0][i].logprob for i in range(len(first))]) - first).abs().max())


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] if name in RELATIVES else []) for name in FAMILIES],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    family.build(folder / "model")
    build_policy(folder / "policy", family.architecture)
    selectors, weights = {}, None
    if family.architecture in CACOVID:
        weights = CacovidWeights.random(HIDDEN, heads=4, kv_heads=2)
        selectors = {"cacovid": write_cacovid(weights, folder / "cacovid")}
    others = (*TRAINING_FREE, *selectors)
    serving = ServingConfig(0.1, "score", allowed_methods=others, policy=str(folder / "policy"), selectors=selectors)
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_logprobs": -1,
        "limit_mm_per_prompt": {"image": 1, "video": 2},
        "ec_manager_config": EncoderCacheManagerConfig(encoder_cache_manager_cls=ENCODER_CACHE_MANAGER),
        "worker_extension_cls": WORKER_EXTENSION,
        "seed": 0,
    }
    llm = LLM(model=str(folder / "model"), hf_overrides=serving.to_overrides(), **options | family.options)
    oracle = Oracle(folder / "model", request.param, family.architecture)
    policy = RetentionPolicy.from_pretrained(folder / "policy")
    made = Served(request.param, family, llm, oracle, policy, weights, folder / "model")
    model = made.model
    # InternVL has one method for both kinds; videos come as a tuple.
    images_by = "_process_image_input" if hasattr(model, "_process_image_input") else "_process_vision_input"
    compress, process_image = model.compressor.compress, getattr(model, images_by)

    def spy_compress(
        x: torch.Tensor, layout: Any, kept: int, method: str, saliency: Any, learned: Any, key: str
    ) -> torch.Tensor:
        made.compressed.append((x.clone(), layout, kept))
        made.saliency.append(None if saliency is None else saliency.clone())
        made.keys.append(key)
        return compress(x, layout, kept, method, saliency, learned, key)

    def spy_image(image_input: Any) -> Any:
        out = process_image(image_input)
        if not isinstance(image_input, tuple):
            made.images.extend(rows.clone() for rows in out)
        return out

    model.compressor.compress = spy_compress
    setattr(model, images_by, spy_image)
    if not made.exact:
        made.noise = engine_noise(made)
    yield made
    made.__dict__.clear()
    del model, llm, oracle
    gc.collect()
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def test_capacity(served: Served) -> None:
    """score-plan says what the engine says."""
    if served.family.architecture not in PLANNED:
        with pytest.raises(UsageError, match="no plan is made"):
            check_capacity(served.llm, served.directory)
    else:
        check_capacity(served.llm, served.directory)


def engine_noise(served: Served) -> float:
    """Largest difference of stock vLLM from transformers: prompts without video, which no code of ours touches."""
    worst = 0.0
    for number, length in enumerate((2, 7, 13, 20, 34, 55, 80, 111)):
        text = f"Number {number}: " + "a line of text. " * length
        pictures = [image(served, number)] if number % 2 else []
        prompt = served.family.image * len(pictures) + text
        output = served.generate(prompt, images=pictures, n=1)
        first, _, _ = served.oracle.greedy(served.oracle.unpruned(prompt, [], pictures, served), [], 1)
        worst = max(worst, served.error(output, first))
    assert 0 < worst < 0.2
    return worst


def image(served: Served, seed: int) -> Any:
    side = 4 * (served.family.pixels or 32)
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("ratio", RATIOS)
def test_text_video_text(ratio: float, served: Served) -> None:
    prompt = f"First some text. {served.family.video} And what happens after that, at length?"
    videos = [served.video(25, 3, 4, seed=int(1000 * ratio))]
    output = served.generate(prompt, videos, ratio=ratio)
    served.check(output, prompt, videos, ratio=ratio)
    x, layout, count = served.compressed[0]
    assert len(x) == layout.grid.num_tokens
    if ratio <= 0.02:
        assert count < layout.grid.t, "some cells must keep nothing"


def test_two_videos_of_different_size_and_ratio(served: Served) -> None:
    prompt = f"A {served.family.video} and B {served.family.video}: compare."
    videos = [served.video(12, 3, 3, seed=11), served.video(9, 2, 5, seed=12, fps=1.3)]
    output = served.generate(prompt, videos, ratio=[0.4, 0.1])
    served.check(output, prompt, videos, ratio=[0.4, 0.1])


def test_image_beside_video(served: Served) -> None:
    prompt = f"{served.family.image} then {served.family.video} end."
    videos, images = [served.video(14, 3, 4, seed=21)], [image(served, 22)]
    output = served.generate(prompt, videos, images, ratio=0.1)
    served.check(output, prompt, videos, images, ratio=0.1)


def test_second_turn_hits_the_prefix_cache(served: Served) -> None:
    video = [served.video(24, 4, 4, seed=31)]
    opening = f"<|im_start|>user\n{served.family.video}What happens?<|im_end|>\n<|im_start|>assistant\n"
    answer = served.generate(opening, video, ratio=0.4)
    captured = list(served.compressed), list(served.saliency), list(served.keys)
    second = opening + answer.outputs[0].text + "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n"
    output = served.generate(second, video, ratio=0.4)
    assert not served.compressed, "the video must not be encoded again"
    if served.exact:  # hybrid models are cached in large steps of their state
        assert output.num_cached_tokens > captured[0][0][2] // 2, "the hit must reach into the video"
    served.compressed, served.saliency, served.keys = captured
    served.check(output, second, video, ratio=0.4)


@pytest.mark.parametrize("step", [64, 128, 512])
def test_prefill_steps_cut_the_span(step: int, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served.exact and step < 512:
        pytest.skip("vLLM aligns the steps of hybrid models to the blocks of their state")
    monkeypatch.setattr(served.scheduler, "max_num_scheduled_tokens", step)
    prompt = f"Look {served.family.video} and say what you see."
    videos = [served.video(40, 4, 5, seed=40 + step)]
    output = served.generate(prompt, videos, ratio=0.9)
    assert len(output.prompt_token_ids) > step or step == 512
    served.check(output, prompt, videos, ratio=0.9)


def test_preemption(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that loses its cache in the middle of decoding starts again, video and all."""
    schedule, steps, preempted = served.scheduler.schedule, [], []

    def spy(*args: Any, **kwargs: Any) -> Any:
        steps.append(0)
        if len(steps) == 5:
            preempted.extend(served.scheduler.running)
            served.scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    monkeypatch.setattr(served.scheduler, "schedule", spy)
    prompt = f"Q {served.family.video} A"
    videos = [served.video(16, 3, 4, seed=51)]
    output = served.generate(prompt, videos, ratio=0.4)
    assert [request.num_preemptions for request in preempted] == [1]
    del served.compressed[1:], served.saliency[1:], served.keys[1:]
    served.check(output, prompt, videos, ratio=0.4)


@pytest.mark.parametrize("method", ["score", "cacovid", *TRAINING_FREE])
def test_every_method(method: str, served: Served) -> None:
    """Merging methods write the first D columns; deepstack levels stay those of the kept index."""
    if method == "cacovid" and served.weights is None:
        pytest.skip("its published policy reads LLaVA's tokens")
    prompt = f"Before {served.family.video} after."
    videos = [served.video(20, 3, 4, seed=61)]
    output = served.generate(prompt, videos, ratio=0.3, method=method)
    served.check(output, prompt, videos, ratio=0.3, method=method)


@pytest.mark.parametrize(("method", "kind"), [("fastvid", "frame"), ("flashvid", "patch")])
def test_rows_and_saliency_equal_the_tower_s_through_transformers(method: str, kind: str, served: Served) -> None:
    """What training, score-viz and evaluation see is what the server sees."""
    if not served.exact:
        pytest.skip("bf16 against fp32")
    frames, metadata = video = served.video(9, 3, 4, seed=65)
    served.generate(f"{served.family.video}?", [video], ratio=0.5, method=method, n=1)
    ((x, layout, _),), (saliency,) = served.compressed, served.saliency
    tower = VisionTower(served.directory)
    rows, grid = tower.encode_rows(frames)
    assert grid == layout.grid
    torch.testing.assert_close(x, rows.flatten(0, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(saliency, tower.encode_with_saliency(frames, [kind])[2][kind], atol=1e-5, rtol=0)
    own = tower.layout(grid, len(frames), metadata["fps"])
    assert np.array_equal(own.to_tensor(), layout.to_tensor())


def test_no_cell_is_encoded_twice(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = f"Again {served.family.video} and again."
    frames, metadata = served.video(26, 3, 5, seed=81)

    def ask(parts: np.ndarray, ratio: float, method: str | None) -> tuple[torch.Tensor, list[int]]:
        videos = [(parts, {**metadata, "total_num_frames": len(parts), "frames_indices": list(range(len(parts)))})]
        output = served.generate(prompt, videos, ratio=ratio, method=method)
        served.check(output, prompt, videos, ratio=ratio, method=method)
        ((x, _, _),) = served.compressed
        return x.clone(), list(output.outputs[0].token_ids)

    check_warm_cells(ask, served.llm, served.model, frames, 2 if served.family.pixels else 1, monkeypatch)


def test_ratio_one_equals_plain_vllm(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compression switched off in the same engine, vLLM's own code runs in every class of ours."""
    prompt = f"{served.family.image} then {served.family.video} end."
    videos, images = [served.video(15, 3, 5, seed=71)], [image(served, 72)]
    whole = served.generate(prompt, videos, images, ratio=1.0, n=12)
    if served.name == "llava_video":
        pytest.skip("vLLM itself does not serve this layout")
    processor = served.llm.llm_engine.renderer.get_mm_processor()
    monkeypatch.setattr(processor, "serving", None)
    monkeypatch.setattr(served.model, "compressor", None)
    if served.name in ("llava_onevision", "internvl"):
        # Without compression the engine would not ask: a plain runner counts positions as slots.
        monkeypatch.setattr(
            served.model, "get_mrope_input_positions", lambda ids, _: (torch.arange(len(ids)).expand(3, -1), 0)
        )
    plain = served.generate(prompt, videos, images, n=12)
    assert not served.compressed
    assert sorted(plain.prompt_token_ids) == sorted(whole.prompt_token_ids)
    assert list(plain.outputs[0].token_ids) == list(whole.outputs[0].token_ids)
    for one, other in zip(plain.outputs[0].logprobs, whole.outputs[0].logprobs, strict=True):
        assert max(abs(one[key].logprob - other[key].logprob) for key in one) < 1e-4
