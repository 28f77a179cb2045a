"""Fixtures for every tier: shared data, clips made on the spot, tiny models."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from datetime import UTC, datetime
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest

# Nothing in the tests may ask the hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: one thread each, and no engine binds itself to the core of another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from score_vllm import methods
from score_vllm.plugin import installed_version

# No test has a time limit of its own: this machine may be busy.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# Methods that Qwen2.5-VL can serve: CaCoVID exists for LLaVA-OneVision alone.
SERVED = [name for name in methods.names() if name != "cacovid"]
ROOT = Path(__file__).resolve().parent.parent
TIERS = ("e2e", "integration", "gpu", "kernels", "unit")


# What tells that a test file starts an engine or a server of vLLM; those that share one come first.
VLLM_USERS = (
    r"\bserver: ",
    r"\bengine: Engine\b",
    r"\bserved: |RUNNER|prefill_latency\.py|running_process|score-serve",
)


@functools.cache
def vllm_rank(path: str) -> int:
    """Place of a test file among those that start vLLM; ``len(VLLM_USERS)`` for the others."""
    if not path.startswith(("tests/e2e/", "tests/integration/")):
        return len(VLLM_USERS)
    text = (ROOT / path).read_text()
    found = (rank for rank, pattern in enumerate(VLLM_USERS) if re.search(pattern, text))
    return next(found, 2 if path.startswith("tests/e2e/") else len(VLLM_USERS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What starts vLLM runs in one worker, one after the other; the other files go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            # Files of compilations are the longest: each of their tests goes to whoever is free.
            one_by_one = path.startswith("tests/kernels/")
            return "vllm" if vllm_rank(path) < len(VLLM_USERS) else nodeid if one_by_one else path

    return ByEngine(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first; an engine that files share is done before others replace its groups."""

    def order(item: pytest.Item) -> tuple[int, int]:
        path = item.path.relative_to(ROOT)
        tier = path.parts[1]
        return vllm_rank(path.as_posix()), TIERS.index(tier) if tier in TIERS else len(TIERS)

    items.sort(key=order)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Leave what ran, on which versions, for scripts/compatibility.py; of runs that touched every tier only."""
    from score_vllm.compatibility import TIERS as RECORDED

    stats = terminalreporter.stats

    def by_tier(*outcomes: str) -> dict[str, int]:
        reports = [report for outcome in outcomes for report in stats.get(outcome, ()) if hasattr(report, "nodeid")]
        tiers = Counter(report.nodeid.split("/")[1] for report in reports if report.nodeid.startswith("tests/"))
        return {tier: tiers[tier] for tier in RECORDED if tiers[tier]}

    passed = by_tier("passed")
    if len(passed) < len(RECORDED):
        return
    import platform

    from vllm.platforms import current_platform

    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    run = {
        "vllm": installed_version(),
        **versions,
        "python": platform.python_version(),
        "platform": "cpu" if current_platform.is_cpu() else "cuda",
        "date": datetime.now(UTC).date().isoformat(),
        "passed": passed,
        "failed": by_tier("failed", "error"),
        "skipped": by_tier("skipped"),
    }
    folder = config.cache.mkdir("score")  # type: ignore[union-attr]
    (folder / "last_run.json").write_text(json.dumps(run, indent=2) + "\n")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared data: ``$SCORE_SHARED``, else ``../shared`` beside the clone; skips where absent."""
    path = Path(os.environ.get("SCORE_SHARED") or ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"shared data not found at {path}; set SCORE_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def shared_videos(shared_dir: Path) -> Path:
    """Folder of real clips."""
    return shared_dir / "videos"


def moving_square(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """[F, H, W, 3] uint8: a bright square crossing a static noisy background."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 120, (1, height, width, 3), dtype=np.uint8), num_frames, axis=0)
    side = max(1, min(height, width) // 4)
    for i in range(num_frames):
        x = (width - side) * i // max(1, num_frames - 1)
        frames[i, height // 3 : height // 3 + side, x : x + side] = (255, 200, 40)
    return frames


def write_clip(path: Path, frames: np.ndarray, fps: int = 8, codec: str = "mpeg4", audio: bool = False) -> Path:
    """Encode frames with PyAV; ``audio`` writes a tone instead of pictures."""
    with av.open(str(path), "w") as container:
        if audio:
            stream = container.add_stream("aac", rate=16000)
            wave = (np.sin(np.arange(16000) / 10)[None] * 8000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            return path
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj444p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 12
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small clips, whole and broken, that the tests make themselves."""
    folder = tmp_path_factory.mktemp("clips")
    plain = write_clip(folder / "plain.mp4", moving_square(48, 120, 160))
    made = {
        "plain": plain,
        "odd": write_clip(folder / "odd.mkv", moving_square(33, 98, 130, seed=1), codec="mpeg4"),
        "one_frame": write_clip(folder / "one_frame.mp4", moving_square(1, 64, 64)),
        "one_pixel_wide": write_clip(folder / "one_pixel_wide.avi", moving_square(8, 48, 1), codec="mjpeg"),
        "thin": write_clip(folder / "thin.avi", moving_square(8, 480, 2)),
        "audio": write_clip(folder / "audio.mp4", np.empty((0, 2, 2, 3), np.uint8), audio=True),
    }
    data = plain.read_bytes()
    for name, content in {
        "truncated": data[: len(data) // 3],
        "empty": b"",
        "not_a_video": b"this is not a video, it is a sentence. " * 50,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n",
    }.items():
        made[name] = folder / f"{name}.mp4"
        made[name].write_bytes(content)
    return made


@pytest.fixture
def fresh_clip(tmp_path: Path) -> Path:
    """A clip that no other test has sent: its pixels are new in every run."""
    seed = int.from_bytes(os.urandom(4), "big")
    return write_clip(tmp_path / "fresh.mp4", moving_square(24, 120, 160, seed=seed))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint in fp32 with the demo's recipe."""
    from score_vllm.demo import build_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    build_model(directory, dtype="float32")
    return directory


def write_selector(model: Path, directory: Path) -> Path:
    """Random VisionSelector weights of a model's width."""
    from transformers import AutoConfig

    from score_vllm.methods.visionselector_weights import SelectorWeights

    SelectorWeights.random(AutoConfig.from_pretrained(model).get_text_config().hidden_size).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_selector(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Random VisionSelector weights for the tiny model."""
    return write_selector(tiny_model, tmp_path_factory.mktemp("selector") / "selector")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retention policy for the tiny model."""
    from score_vllm.demo import build_policy

    directory = tmp_path_factory.mktemp("policy") / "policy"
    build_policy(directory)
    return directory
