"""How one source of training samples is described: plain fields, so that a TOML table is one of these."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from score_vllm.video.sampling import DEFAULT_FPS, DEFAULT_MAX_FRAMES

SPLITS = ("train", "held_out", "all")
TURNS = ("first", "all")
# 768 merged tokens per pair of frames in Qwen2.5-VL.
DEFAULT_MAX_PIXELS = 768 * 28 * 28

_EVERY_KIND = ("kind", "split", "limit", "weight")
_FILES = ("path", "media", "held_out", "cache", "max_pixels", "fps")
KINDS: dict[str, tuple[str, ...]] = {
    "world": _EVERY_KIND,
    "world-pseudo": _EVERY_KIND,
    "onevision-pseudo": (*_EVERY_KIND, *_FILES, "prompt", "seed"),
    "llava-video": (*_EVERY_KIND, *_FILES, "max_frames", "turns"),
    "koala": (
        *_EVERY_KIND,
        *_FILES,
        "max_frames",
        "prompt",
        "min_clarity",
        "min_aesthetic",
        "min_training_suitability",
        "min_seconds",
        "max_seconds",
        "present_only",
    ),
    "jsonl": (*_EVERY_KIND, *_FILES, "max_frames", "prompt"),
}


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples. A field that ``kind`` does not use must keep its default.

    Attributes:
        kind: one of :data:`KINDS`.
        path: data file, a folder that is searched for such files, or a pattern with ``*``.
        media: folder that the videos' paths start from; empty: the folder of the data file. Koala: the clips' folder.
        split: ``train``, ``held_out`` or ``all``; empty means ``train``. Of the world kinds: any name that
            their sources accept, empty for the source's own default.
        held_out: fraction in [0, 1) of the videos that ``held_out`` gets and ``train`` does not.
        limit: at most this many samples, the first ones; 0 means all. Of the world kinds: the number of clips.
        weight: share of this source where several are mixed, > 0.
        seed: >= 0; of the pseudo-videos' random choices.
        prompt: what is asked where the data brings no question; empty: a default text.
        fps: frames per second read, > 0. Of pseudo-videos: the rate that their frames are said to have.
        max_frames: most frames read from a video, >= 2.
        max_pixels: frames above this many pixels are made smaller, >= 28 * 28.
        turns: ``first`` pair of question and answer of a conversation, or ``all``, each pair a sample of its own.
        min_clarity, min_aesthetic, min_training_suitability: least score of a Koala row; 0 means any.
        min_seconds, max_seconds: bounds on a Koala clip's time span; 0 means none.
        present_only: leave out Koala rows whose clip is not in ``media``, instead of counting each as broken.
        cache: folder for the index files; empty: ``score_vllm.demo.cache_directory()/index``.

    Raises:
        ValueError: an unknown kind or split, a value out of range, or a field that the kind does not use.
    """

    kind: str
    path: str = ""
    media: str = ""
    split: str = ""
    held_out: float = 0.02
    limit: int = 0
    weight: float = 1.0
    seed: int = 0
    prompt: str = ""
    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    max_pixels: int = DEFAULT_MAX_PIXELS
    turns: str = "first"
    min_clarity: float = 0.0
    min_aesthetic: float = 0.0
    min_training_suitability: float = 0.0
    min_seconds: float = 0.0
    max_seconds: float = 0.0
    present_only: bool = False
    cache: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"source kind must be one of {sorted(KINDS)}, got {self.kind!r}{_hint(self.kind, KINDS)}")
        for spec in fields(self):
            value = getattr(self, spec.name)
            self._check_type(spec.name, spec.type if isinstance(spec.type, str) else spec.type.__name__, value)
            if spec.name not in KINDS[self.kind] and value != spec.default:
                raise ValueError(
                    f"source of kind '{self.kind}' does not use {spec.name}, got {value!r}; "
                    f"it uses {sorted(KINDS[self.kind])}"
                )
        self._check_ranges()

    def _check_type(self, name: str, kind: str, value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = {
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "int": number and isinstance(value, int),
            "float": number and math.isfinite(value),
        }[kind]
        if not right:
            words = {"str": "a string", "bool": "true or false", "int": "an integer", "float": "a finite number"}[kind]
            raise ValueError(f"source {name} must be {words}, got {value!r}")

    def _check_ranges(self) -> None:
        if "path" in KINDS[self.kind]:
            if not self.path:
                raise ValueError(f"source of kind '{self.kind}' needs path, the data's file or folder")
            if self.split and self.split not in SPLITS:
                raise ValueError(f"source split must be one of {list(SPLITS)} or empty, got {self.split!r}")
        if self.kind == "koala" and not self.media:
            raise ValueError("source of kind 'koala' needs media, the folder of the clips <videoID>.mp4")
        if self.turns not in TURNS:
            raise ValueError(f"source turns must be one of {list(TURNS)}, got {self.turns!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"source held_out must be in [0, 1), got {self.held_out!r}")
        for name, least in (("limit", 0), ("seed", 0), ("max_frames", 2), ("max_pixels", 28 * 28)):
            if getattr(self, name) < least:
                raise ValueError(f"source {name} must be >= {least}, got {getattr(self, name)!r}")
        for name in ("weight", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"source {name} must be > 0, got {getattr(self, name)!r}")
        for name in ("min_clarity", "min_aesthetic", "min_training_suitability", "min_seconds", "max_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"source {name} must be >= 0, got {getattr(self, name)!r}")
        if self.max_seconds and self.max_seconds < self.min_seconds:
            raise ValueError(
                f"source max_seconds must be 0 or >= min_seconds = {self.min_seconds}, got {self.max_seconds!r}"
            )

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> SourceConfig:
        """Read a table.

        Raises:
            ValueError: unknown keys (the known ones are listed), ``kind`` missing, or as the class.
        """
        known = [spec.name for spec in fields(cls)]
        if unknown := sorted(set(raw) - set(known)):
            raise ValueError(f"source has unknown keys {unknown}{_hint(unknown[0], known)}; known keys are {known}")
        if "kind" not in raw:
            raise ValueError(f"source lacks the key 'kind', one of {sorted(KINDS)}")
        return cls(**raw)


def _hint(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
