"""The policy beside the baselines, on a few clips: cross-entropy, right answers, and what is kept where."""

from __future__ import annotations

import base64
import io
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from score_vllm import RetentionPolicy, TokenSelection, select_tokens
from score_vllm.train.frozen.model import AnsweringEngine, Engine
from score_vllm.train.report.charts import percent
from score_vllm.train.report.clips import ReportClip
from score_vllm.viz.draw import contact_sheet
from score_vllm.viz.paint import THEMES

# ``score`` is the policy of the run.
METHODS = ("score", "vidcom2", "uniform", "random")
RATIOS = (0.4, 0.25, 0.1, 0.05)
DRAWN = (("score", 0.25), ("score", 0.1), ("vidcom2", 0.1), ("uniform", 0.1))
# Beside the methods: every token, and none.
ALL, NONE = ("all tokens", 1.0), ("no tokens", 0.0)
# Ratio of the kept tokens over time, and the number of its places.
OVER_TIME, PLACES = 0.1, 20
QUALITY = 82

Key = tuple[str, float]


@dataclass(frozen=True)
class Sheet:
    """A drawn clip: its name, what was asked and expected, and pictures (WebP as data URIs) by theme, with their width
    in pixels."""

    name: str
    prompt: str
    target: str
    pictures: dict[str, str]
    width: int


@dataclass
class Findings:
    """What was measured.

    Attributes:
        seen: training used these clips, too.
        cross_entropy: per method and ratio the values of the clips, nats per target token.
        accuracy: the same of the share of questions answered exactly right; clips without questions are left out.
        questions: that were asked about all clips.
        over_time: per method the share kept at :data:`PLACES` places from a clip's begin to its end, summed over clips.
        sheets: drawn clips.
        seconds: that all this took.
    """

    seen: bool
    cross_entropy: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    accuracy: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    questions: int = 0
    over_time: dict[str, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(PLACES)))
    sheets: list[Sheet] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clips(self) -> int:
        """That were measured."""
        return len(self.cross_entropy[ALL])


def measure(
    clips: Iterable[ReportClip], engine: Engine, policy: RetentionPolicy, *, pictures: int, seen: bool
) -> Findings:
    """Run every selection of every clip, all of one clip together as a group of rollouts is.

    Args:
        clips: to measure.
        engine: the frozen model.
        policy: trained for it.
        pictures: of the first clips, how many are drawn.
        seen: training used these clips.
    """
    started = time.perf_counter()
    found = Findings(seen)
    for number, clip in enumerate(clips):
        x, grid = clip.encoded.x, clip.encoded.grid
        made: dict[Key, TokenSelection] = {}
        for method in METHODS:
            for ratio in RATIOS:
                weights = policy.to(x.device) if method == "score" else None
                one = select_tokens(x, ratio, method, weights, grid=grid)
                made[method, ratio] = replace(one, indices=one.indices.cpu())
            kept = made[method, OVER_TIME].kept_per_frame().numpy() / grid.tokens_per_frame
            places = (np.arange(PLACES) + 0.5) / PLACES * grid.t - 0.5
            found.over_time[method] += np.interp(places, np.arange(grid.t), kept)
        indices = {
            ALL: torch.arange(grid.num_tokens),
            NONE: torch.empty(0, dtype=torch.int64),
            **{key: selection.indices for key, selection in made.items()},
        }
        selections = list(indices.values())
        for key, ce in zip(indices, engine.cross_entropy(clip.encoded, selections).tolist(), strict=True):
            found.cross_entropy[key].append(ce)
        if clip.questions and isinstance(engine, AnsweringEngine):
            right = torch.stack(
                [
                    engine.answers_right(engine.with_text(clip.encoded, question, answer), selections).float()
                    for _, question, answer in clip.questions
                ]
            )
            found.questions += len(right)
            for key, share in zip(indices, right.mean(0).tolist(), strict=True):
                found.accuracy[key].append(share)
        if number < pictures:
            found.sheets.append(_sheet(clip, made))
    found.seconds = time.perf_counter() - started
    return found


def _sheet(clip: ReportClip, made: dict[Key, TokenSelection]) -> Sheet:
    names = {"score": "policy"}
    shown = {f"{names.get(method, method)} at {percent(ratio)}:": made[method, ratio] for method, ratio in DRAWN}
    frames, pictures, width = clip.sample.frames, {}, 0
    seconds = np.arange(len(frames)) / clip.sample.fps  # from where reading began
    for name, theme in THEMES.items():
        drawn = contact_sheet(frames, clip.encoded.grid, shown, times=seconds, cell_width=160, theme=theme)
        buffer, width = io.BytesIO(), drawn.shape[1]
        Image.fromarray(drawn).save(buffer, "WEBP", quality=QUALITY)
        pictures[name] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Sheet(clip.sample.key, clip.sample.prompt, clip.sample.target, pictures, width)
