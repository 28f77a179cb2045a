"""The models that ``--model`` can name: the demo, short names, hub ids and directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from score_vllm.architectures import SHORT_NAMES, UNCONVERTED
from score_vllm.demo import demo_clip, ensure_demo

DEMO = "demo"
# Selects where there is no policy.
TRAINING_FREE_METHOD = "vidcom2"
TRAIN_COMMAND = "python -m score_vllm.train --config train/configs/qwen2_5_vl_7b.toml"


class UsageError(Exception):
    """An operator's mistake; its message is the one sentence that is printed."""


@dataclass(frozen=True)
class ResolvedModel:
    """What ``--model`` stands for."""

    path: str
    served_names: list[str]
    demo_policy: str | None = None
    demo_clip: Path | None = None


def resolve_model(name: str) -> ResolvedModel:
    """Turn ``demo`` and short names into what vLLM loads; the typed name stays usable in requests."""
    if name == DEMO:
        model, policy = ensure_demo()
        return ResolvedModel(str(model), [DEMO], str(policy), demo_clip())
    if name in SHORT_NAMES:
        return ResolvedModel(SHORT_NAMES[name], [name, SHORT_NAMES[name]])
    if name in UNCONVERTED:
        raise UsageError(
            f"--model {name!r} has no checkpoint that vLLM reads: download {UNCONVERTED[name]}, convert it with "
            "python -m score_vllm.convert_llava_video SRC DST, and give --model DST"
        )
    if looks_short := [known for known in SHORT_NAMES if known.lower() == name.lower()]:
        raise UsageError(f"--model {name!r} is not known; did you mean {looks_short[0]!r}?")
    # A hub id is owner/name. Anything else must be here: asking the hub for it would only take time.
    if not Path(name).expanduser().is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UsageError(
            f"--model {name!r} is no directory, no hub id (owner/name) and no short name "
            f"({', '.join([DEMO, *SHORT_NAMES])})"
        )
    return ResolvedModel(name, [name])
