"""Which model a benchmark runs: real weights, the demo, or ``bench``, whose prefill is a real share of a request.

``bench`` has the Qwen2.5-VL architecture and seeded random weights: its answers are noise, its costs are real. Its
sizes give the vision tower about a third of the language model's linear work per visual token, as in Qwen2.5-VL-7B
(4 patches * 0.67 G parameters against 7.6 G), at a scale that two CPU cores can serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20260326
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    # Long enough for 2,048 frames uncompressed.
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "fullatt_block_indexes": [2, 5],
    "out_hidden_size": 512,
}


@dataclass(frozen=True)
class BenchModel:
    """What to serve.

    Attributes:
        path: model directory or hub id.
        policy: policy directory or hub id.
        description: one phrase for tables and pictures; says where weights are random.
    """

    path: str
    policy: str
    description: str


def resolve_model(model: str, policy: str | None) -> BenchModel:
    """Build what must be built.

    Args:
        model: ``bench``, ``demo``, a directory or a hub id.
        policy: a directory or hub id; None takes the seeded one of ``bench`` and ``demo``.

    Raises:
        ValueError: real weights without a policy.
    """
    if model == "bench":
        directory, own = ensure_bench_model()
        layers, width = TEXT_CONFIG["num_hidden_layers"], TEXT_CONFIG["hidden_size"]
        text = f"bench model (random weights, {layers} layers of {width})"
        return BenchModel(str(directory), policy or str(own), text)
    if model == "demo":
        from score_vllm.demo import ensure_demo

        directory, own = ensure_demo()
        return BenchModel(str(directory), policy or str(own), "demo model")
    if policy is None:
        raise ValueError(f"--policy is needed for --model {model}: only 'bench' and 'demo' bring one")
    return BenchModel(model, policy, Path(model).name)


def ensure_bench_model() -> tuple[Path, Path]:
    """Build the ``bench`` model in the cache at first use; ``(model directory, policy directory)``.

    Safe against two starts at once (a file lock) and against a kill half-way (built aside, then renamed).
    """
    from filelock import FileLock

    from score_vllm import demo
    from score_vllm.demo import build_model, cache_directory
    from score_vllm.policy import RetentionPolicy

    # What build_model adds: another recipe is another folder of the cache.
    rest = [demo.SPECIAL_TOKENS, demo.CHAT_TEMPLATE, demo.TEXT_CONFIG, demo.VISION_CONFIG, demo.PIXELS]
    recipe = json.dumps([SEED, TEXT_CONFIG, VISION_CONFIG, *rest], sort_keys=True)
    root = cache_directory()
    root.mkdir(parents=True, exist_ok=True)
    home = root / f"bench-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with FileLock(str(home) + ".lock"):
        if not home.is_dir():
            staging = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=root))
            try:
                build_model(
                    staging / "model",
                    seed=SEED,
                    dtype="float32",
                    text_config=TEXT_CONFIG,
                    vision_config=VISION_CONFIG,
                )
                chosen = RetentionPolicy(TEXT_CONFIG["hidden_size"], model_id="bench", seed=SEED)
                chosen.save_pretrained(staging / "policy", origin="seeded random weights, not trained", seed=SEED)
                staging.chmod(0o755)
                os.replace(staging, home)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return home / "model", home / "policy"
