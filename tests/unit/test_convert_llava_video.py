"""The converter on a tiny checkpoint under the original's names: what transformers reads back is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from score_vllm import convert_llava_video
from score_vllm.convert_llava_video import ConversionError, convert, rename
from tests.integration.tiny_families import build_llava, write_original


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(converted by hand, original)``: the same weights in two shards, the original's config and tokenizer."""
    folder = tmp_path_factory.mktemp("llava")
    build_llava(folder / "known", mm_spatial_pool_mode="average", mm_newline_position="grid")
    source = folder / "source"
    write_original(folder / "known", source)
    return folder / "known", source


def test_the_converted_model_is_the_same(original: tuple[Path, Path], tmp_path: Path) -> None:
    known, source = original
    chosen = convert(source, tmp_path / "made" / "model", heads=2)
    assert chosen == {"mm_newline_position": "grid (default)", "mm_spatial_pool_mode": "average (config.json)"}
    made = tmp_path / "made" / "model"
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["model"], "nothing half-written stays"
    ours = {name: weight for shard in made.glob("*.safetensors") for name, weight in load_file(shard).items()}
    reference = tf.LlavaOnevisionForConditionalGeneration.from_pretrained(known).eval()
    model, info = tf.LlavaOnevisionForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(ours) == len(reference.state_dict())
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert (model.config.mm_newline_position, model.config.mm_spatial_pool_mode) == ("grid", "average")
    processor = tf.AutoProcessor.from_pretrained(made)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert "<|im_start|>user\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n" in text
    ids = processor.tokenizer(text).input_ids
    assert ids.count(model.config.video_token_index) == 1
    pinpoints = model.config.image_grid_pinpoints
    assert [list(pair) for pair in pinpoints] == [[126, 126], [126, 252], [252, 126], [252, 252]]
    frames = torch.zeros(2, 3, 126, 126)
    videos = processor.video_processor([frames], return_tensors="pt")["pixel_values_videos"]
    assert videos.shape == (1, 2, 3, 126, 126)
    with torch.no_grad():
        one = reference.model.vision_tower(videos[0], output_hidden_states=True).hidden_states[-1]
        other = model.model.vision_tower(videos[0], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(one, other)


def test_what_cannot_be_converted_is_refused(original: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    known, source = original
    with pytest.raises(ConversionError, match="not \\['LlavaQwenForCausalLM'\\]"):
        convert(known, tmp_path / "x")
    with pytest.raises(ConversionError, match="cannot read"):
        convert(tmp_path, tmp_path / "x")
    with pytest.raises(ConversionError, match="exists"):
        convert(source, tmp_path)
    with pytest.raises(ConversionError, match="no multiple of its 7 heads"):
        convert(source, tmp_path / "x", heads=7)
    with pytest.raises(ConversionError, match="of no LLaVA-Video checkpoint"):
        rename("transformer.wte.weight")
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"
    assert convert_llava_video.main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("convert_llava_video: cannot read")
