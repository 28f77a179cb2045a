"""The models that can be compressed: one table, from which registration, short names and the documentation come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of vLLM.

    Attributes:
        name: vLLM's.
        target: our class, as a string: vLLM imports it when such a model is loaded.
        models: short name -> hub id.
        notes: what a reader of the table of supported models should know.
        sampling: frames a second (None: evenly over the video) and the most frames, where a request names none.
        sequential: 1-D positions, which vLLM is told to carry through M-RoPE.
        policy: for which of its models a trained policy is there.
        checked: what its tests and measurements ran on; notes, policy and this are the same for all of one file.
    """

    name: str
    target: str
    models: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    sampling: tuple[float | None, int] = (2.0, 128)
    sequential: bool = False
    policy: str = ""
    checked: str = "nothing yet"


def _sizes(prefix: str, hub: str, suffix: str, *sizes: str) -> dict[str, str]:
    return {f"{prefix}-{size}": f"{hub}-{size}{suffix}" for size in sizes}


_MODELS = "score_vllm.models"
_TINY = "tiny random weights against transformers"

SUPPORTED = (
    Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        f"{_MODELS}.qwen2_5_vl:ScoreQwen2_5_VLForConditionalGeneration",
        _sizes("Qwen2.5-VL", "Qwen/Qwen2.5-VL", "-Instruct", "3B", "7B", "32B", "72B")
        | {"Cosmos-Reason1-7B": "nvidia/Cosmos-Reason1-7B"},
        "the paper's first model",
        policy="the demo model's; else `vidcom2` selects",
        checked="the demo model, and tiny random weights against transformers",
    ),
    Architecture(
        "Qwen2VLForConditionalGeneration",
        f"{_MODELS}.qwen2_vl:ScoreQwen2VLForConditionalGeneration",
        _sizes("Qwen2-VL", "Qwen/Qwen2-VL", "-Instruct", "2B", "7B", "72B"),
        checked=_TINY,
    ),
    Architecture(
        "Qwen3VLForConditionalGeneration",
        f"{_MODELS}.qwen3_vl:ScoreQwen3VLForConditionalGeneration",
        _sizes("Qwen3-VL", "Qwen/Qwen3-VL", "-Instruct", "2B", "4B", "8B", "32B")
        | _sizes("Cosmos-Reason2", "nvidia/Cosmos-Reason2", "", "2B", "8B"),
        "timestamps and markers of every cell stay",
        checked=_TINY,
    ),
    Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        f"{_MODELS}.qwen3_vl:ScoreQwen3VLMoeForConditionalGeneration",
        _sizes("Qwen3-VL", "Qwen/Qwen3-VL", "-Instruct", "30B-A3B", "235B-A22B"),
        "timestamps and markers of every cell stay",
        checked=_TINY,
    ),
    Architecture(
        "Qwen3_5ForConditionalGeneration",
        f"{_MODELS}.qwen3_5:ScoreQwen3_5ForConditionalGeneration",
        _sizes("Qwen3.5", "Qwen/Qwen3.5", "", "0.8B", "2B", "4B", "9B", "27B")
        | _sizes("Qwen3.6", "Qwen/Qwen3.6", "", "27B"),
        "timestamps and markers of every cell stay; linear attention reads no positions",
        checked=_TINY,
    ),
    Architecture(
        "Qwen3_5MoeForConditionalGeneration",
        f"{_MODELS}.qwen3_5:ScoreQwen3_5MoeForConditionalGeneration",
        _sizes("Qwen3.5", "Qwen/Qwen3.5", "", "35B-A3B", "122B-A10B")
        | _sizes("Qwen3.6", "Qwen/Qwen3.6", "", "35B-A3B"),
        "timestamps and markers of every cell stay; linear attention reads no positions",
        checked=_TINY,
    ),
    Architecture(
        "LlavaOnevisionForConditionalGeneration",
        f"{_MODELS}.llava_onevision:ScoreLlavaOnevisionForConditionalGeneration",
        {
            f"LLaVA-OneVision-{size}": f"llava-hf/llava-onevision-qwen2-{size.lower()}-ov-hf"
            for size in ("0.5B", "7B", "72B")
        },
        "LLaVA-Video, the paper's second model, after `python -m score_vllm.convert_llava_video`; newlines stay",
        sampling=(None, 64),
        sequential=True,
        checked=_TINY,
    ),
    Architecture(
        "Glm4vForConditionalGeneration",
        f"{_MODELS}.glm:ScoreGlm4vForConditionalGeneration",
        {"GLM-4.1V-9B": "zai-org/GLM-4.1V-9B-Thinking", "GLM-4.6V-Flash": "zai-org/GLM-4.6V-Flash"},
        "markers and time of every cell stay",
        checked=_TINY,
    ),
    Architecture(
        "Glm4vMoeForConditionalGeneration",
        f"{_MODELS}.glm:ScoreGlm4vMoeForConditionalGeneration",
        {"GLM-4.5V": "zai-org/GLM-4.5V", "GLM-4.6V": "zai-org/GLM-4.6V"},
        "markers and time of every cell stay",
        checked=_TINY,
    ),
    Architecture(
        "InternVLForConditionalGeneration",
        f"{_MODELS}.internvl:ScoreInternVLForConditionalGeneration",
        _sizes("InternVL3.5", "OpenGVLab/InternVL3_5", "-HF", "1B", "2B", "4B", "8B", "14B", "38B"),
        "number and markers of every frame stay; the `-HF` checkpoints alone",
        sampling=(None, 64),
        sequential=True,
        checked=_TINY,
    ),
)
BY_NAME = {entry.name: entry for entry in SUPPORTED}
SHORT_NAMES = {short: hub for entry in SUPPORTED for short, hub in entry.models.items()}

# Short names of models whose hub checkpoints vLLM does not read.
UNCONVERTED = {f"LLaVA-Video-{size}": f"lmms-lab/LLaVA-Video-{size}-Qwen2" for size in ("7B", "72B")}

# Architectures that users ask for, and why they are refused.
REFUSED = {
    "Gemma4ForConditionalGeneration": (
        "visual tokens attend to each other in both directions and layers look up embeddings by token id, so dropping "
        "some changes the rest; at 70 tokens a frame there is little to save"
    ),
    "Molmo2ForConditionalGeneration": (
        "visual tokens attend to each other in both directions, so dropping some changes the rest"
    ),
    "InternVLChatModel": (
        "this is InternVL's original format, whose code comes with the checkpoint: serve the same model in "
        "transformers' format (-HF or -hf at the end of its name)"
    ),
    "LlavaQwenForCausalLM": (
        "this is an original LLaVA-Video checkpoint, which vLLM does not read: convert it first with "
        "python -m score_vllm.convert_llava_video SRC DST"
    ),
}
