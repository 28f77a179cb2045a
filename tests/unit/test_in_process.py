"""A checkpoint asked in this process: answers, counts, and the two rules for LLaVA-Video's newlines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import accuracy
from benchmarks.in_process import InProcess, kept_structure
from score_vllm import num_retained_tokens, select_tokens
from score_vllm.client import RequestFailed, chat_body, user_message
from score_vllm.layout import grid_layout, sequential_layout
from score_vllm.types import VideoGrid
from score_vllm.video import decode_video
from tests.conftest import moving_square, write_clip
from tests.integration.family_oracle import Oracle, Unpruned
from tests.integration.tiny_families import build_llava, build_policy
from tests.public_sets import videomme_rows, write_videomme

VIDEO = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava_video")
    build_llava(folder / "model", **VIDEO)
    build_policy(folder / "policy", "LlavaOnevisionForConditionalGeneration")
    write_clip(folder / "clip.mp4", moving_square(10, 120, 160, seed=3))
    return folder


def ask(own: InProcess, clip: Path, **fields: Any) -> Any:
    async def answer() -> Any:
        async with own:
            return await own.chat(chat_body("any", [user_message(clip.as_uri(), "What?")], **fields))

    return asyncio.run(answer())


def test_newlines_of_rows_that_keep_a_token() -> None:
    layout = sequential_layout(VideoGrid(2, 2, 3), [[]] * 2, [[]] * 2, row_newlines=True)
    # Tokens 0 and 2 lie in the first row, 11 in the last.
    kept = torch.tensor([0, 2, 11])
    assert kept_structure(layout, kept, "kept-rows").tolist() == [True, False, False, True]
    assert kept_structure(layout, kept, "all").all()
    with pytest.raises(ValueError, match="kept-rows is for LLaVA-Video"):
        kept_structure(grid_layout(VideoGrid(2, 2, 3), 1.0), kept, "kept-rows")


@pytest.mark.parametrize("newlines", ["all", "kept-rows"])
@pytest.mark.parametrize(("ratio", "method"), [(1.0, "score"), (0.1, "score"), (0.2, "fastvid")])
def test_answers_are_the_whole_model_s(newlines: str, ratio: float, method: str, checkpoint: Path) -> None:
    """Rows and newlines put together by hand, and transformers' own model on them."""
    own = InProcess(checkpoint / "model", checkpoint / "policy", newlines)
    reply = ask(own, checkpoint / "clip.mp4", retention_ratio=ratio, retention_method=method, max_tokens=6)
    oracle = Oracle(checkpoint / "model", "llava_video", "LlavaOnevisionForConditionalGeneration")
    frames = decode_video((checkpoint / "clip.mp4").read_bytes(), fps=None, max_frames=64).frames
    x, grid, saliency = own.tower.encode_with_saliency(frames)
    policy = own.policy if method == "score" else None
    made = select_tokens(x, ratio, method, policy, saliency=saliency["frame"])
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    prompt = oracle.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    seen = SimpleNamespace(compressed=[(x.flatten(0, 1),)], images=[])
    whole = oracle.unpruned(prompt, [(frames, {})], [], seen)
    rows = {int(index) // grid.w for index in made.indices} if newlines == "kept-rows" else set(range(grid.t * grid.h))
    first = int((whole.vision == 0).nonzero()[0])
    stays = torch.ones(len(whole.vision), dtype=torch.bool)
    for row in set(range(grid.t * grid.h)) - rows:
        stays[first + row * (grid.w + 1) + grid.w] = False
    pruned = Unpruned(whole.embeds[stays], whole.positions[:, stays], whole.vision[stays])
    _, tokens, _ = oracle.greedy(pruned, [made.indices], 6, [made.embeddings])
    ends = [n for n, token in enumerate(tokens) if token in own._ends]
    assert reply.text == oracle.tokenizer.decode(tokens[: (ends or [6])[0]], skip_special_tokens=True)
    (report,) = reply.score["videos"]
    assert report["retained_tokens"] == num_retained_tokens(grid.num_tokens, ratio)
    assert report["structure_tokens"] == len(rows)
    text = int((whole.vision < 0).sum()) - grid.t * grid.h
    assert reply.prompt_tokens == text + report["retained_tokens"] + len(rows)


def test_a_public_set_with_the_rule_of_table_2(checkpoint: Path, tmp_path: Path) -> None:
    """64 frames, FastVID's newlines: the count of tokens follows the selection."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for stem in ("one", "two", "three"):
        (videos / f"{stem}.mp4").write_bytes((checkpoint / "clip.mp4").read_bytes())
    data = write_videomme(tmp_path / "set.parquet", videomme_rows(["one", "two", "three"]))
    fixed = ["--benchmark", "videomme", "--data", str(data), "--videos", str(videos), "--max-tokens", "4"]
    fixed += ["--transformers", str(checkpoint / "model"), "--retention-method", "fastvid"]
    fixed += ["--retention-ratio", "1", "0.1", "--video-max-frames", "64"]
    lengths = {}
    for newlines in ("all", "kept-rows"):
        output = tmp_path / f"{newlines}.json"
        assert accuracy.main([*fixed, "--newlines", newlines, "--output", str(output)]) == 0
        content = json.loads(output.read_text())
        assert (content["newlines"], content["model"], content["base_url"]) == (newlines, "model", "transformers")
        assert [row["scored"] for row in content["rows"]] == [3, 3]
        lengths[newlines] = [row["prompt_tokens_mean"] for row in content["rows"]]
    assert lengths["all"][0] == lengths["kept-rows"][0]
    assert lengths["all"][1] > lengths["kept-rows"][1]


def test_what_cannot_be_asked(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = InProcess(checkpoint / "model")
    with pytest.raises(RequestFailed, match="No such file"):
        ask(own, checkpoint / "missing.mp4", max_tokens=1)
    with pytest.raises(ValueError, match="newlines must be one of"):
        InProcess(checkpoint / "model", newlines="none")
    fixed = ["--benchmark", "videomme", "--data", "d.parquet", "--videos", str(tmp_path)]
    assert accuracy.main([*fixed, "--newlines", "kept-rows"]) == 2
    assert "go with --transformers" in capsys.readouterr().err
