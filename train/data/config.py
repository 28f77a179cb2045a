"""How sources of training samples are described: one model per kind, so that a TOML table is one of these."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from score_vllm.train.schema import Settings, build
from score_vllm.video.sampling import DEFAULT_CELL_TOKENS, DEFAULT_FPS, DEFAULT_MAX_FRAMES

# The server's limit, in pixels of Qwen2.5-VL.
DEFAULT_MAX_PIXELS = DEFAULT_CELL_TOKENS * 28 * 28
# Subsets of LLaVA-OneVision-Data whose answers describe the whole image at length. The others answer questions.
CAPTION_SUBSETS = (
    "image_textualization(filtered)",
    "sharegpt4o",
    "sharegpt4v(coco)",
    "sharegpt4v(knowledge)",
    "sharegpt4v(llava)",
    "sharegpt4v(sam)",
)


class AnySource(Settings):
    """What every source has.

    Attributes:
        limit: at most this many samples, drawn by ``seed`` from all rows of all files; 0 means all.
        weight: share of this source where several are mixed.
        seed: of the draw, and of pseudo-videos' random choices.
    """

    kind: str
    limit: int = Field(default=0, ge=0)
    weight: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)


class WorldConfig(AnySource):
    """The demo's synthetic world.

    Attributes:
        split: any name that the world accepts; empty for its default.
    """

    kind: Literal["world", "world-pseudo"]
    split: str = ""


class CompositeConfig(AnySource):
    """Real footage with events pasted on, see :mod:`score_vllm.train.world.composite_source`.

    Attributes:
        split: any name but those of evaluation; empty for ``policy``.
        path: folder that ``python -m score_vllm.train.world.footage`` filled.
    """

    kind: Literal["composite"]
    split: str = ""
    path: str = "runs/footage"


class FileConfig(AnySource):
    """Data in files.

    Attributes:
        path: data file, a folder that is searched for such files, or a pattern with ``*``.
        media: folder that the videos' paths start from; empty: the folder of the data file. Koala: the clips' folder.
        split: empty means ``train``.
        held_out: fraction of the videos that ``held_out`` gets and ``train`` does not.
        prompt: what is asked where the data brings no question; empty: a default text.
        fps: frames per second read. Of pseudo-videos: the rate that their frames are said to have.
        max_pixels: frames above this many pixels are made smaller.
        cache: folder for the index files; empty: ``score_vllm.demo.cache_directory()/index``.
    """

    path: str = Field(min_length=1)
    media: str = ""
    split: Literal["", "train", "held_out", "all"] = ""
    held_out: float = Field(default=0.02, ge=0, lt=1)
    prompt: str = ""
    fps: float = Field(default=DEFAULT_FPS, gt=0)
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=28 * 28)
    cache: str = ""


class VideoConfig(FileConfig):
    """Videos in files.

    Attributes:
        max_frames: most frames read from a video.
    """

    max_frames: int = Field(default=DEFAULT_MAX_FRAMES, ge=2)


class OneVisionConfig(FileConfig):
    """Pseudo-videos of LLaVA-OneVision-Data's images.

    Attributes:
        subsets: folders of ``path`` that are read, by name; ``["all"]`` reads every one.
    """

    kind: Literal["onevision-pseudo"]
    subsets: tuple[str, ...] = Field(default=CAPTION_SUBSETS, strict=False, min_length=1)


class StillsConfig(FileConfig):
    """Pseudo-videos of captioned pictures: JSON lines ``{"image": path, "caption": text}``."""

    kind: Literal["stills"]


class LlavaVideoConfig(VideoConfig):
    """LLaVA-Video-178K and ShareGPT-style files.

    Attributes:
        task: which of a folder's files are read, by the part ``_cap_``, ``_oe_`` or ``_mc_`` of their names:
            captions, open questions, multiple choice, ``qa`` for both kinds of question, or ``all`` whatever they are
            called. A single file named by ``path`` is read in any case.
        turns: ``first`` pair of question and answer of a conversation, or ``all``, each pair a sample of its own.
    """

    kind: Literal["llava-video"]
    task: Literal["cap", "oe", "mc", "qa", "all"] = "cap"
    turns: Literal["first", "all"] = "first"


class KoalaConfig(VideoConfig):
    """Koala-36M.

    Attributes:
        min_clarity, min_aesthetic, min_training_suitability: least score of a row; 0 means any.
        min_seconds, max_seconds: bounds on a clip's time span; 0 means none.
        present_only: leave out rows whose clip is not in ``media``, instead of counting each as broken.
    """

    kind: Literal["koala"]
    media: str = Field(min_length=1)
    min_clarity: float = Field(default=0.0, ge=0)
    min_aesthetic: float = Field(default=0.0, ge=0)
    min_training_suitability: float = Field(default=0.0, ge=0)
    min_seconds: float = Field(default=0.0, ge=0)
    max_seconds: float = Field(default=0.0, ge=0)
    present_only: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_seconds and self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds must be 0 or >= min_seconds = {self.min_seconds}, got {self.max_seconds!r}")
        return self


class JsonlConfig(VideoConfig):
    """JSON lines, as ``python -m score_vllm.train.annotate`` writes them."""

    kind: Literal["jsonl"]


SourceConfig = Annotated[
    WorldConfig | CompositeConfig | OneVisionConfig | StillsConfig | LlavaVideoConfig | KoalaConfig | JsonlConfig,
    Field(discriminator="kind"),
]
_CLASSES = typing.get_args(typing.get_args(SourceConfig)[0])
KINDS = {kind: cls for cls in _CLASSES for kind in typing.get_args(cls.model_fields["kind"].annotation)}


def source_config(where: str = "source", **fields: Any) -> Any:
    """A source's description from its fields.

    Raises:
        ValueError: an unknown kind or field, or a value out of range; one sentence.
    """
    return build(SourceConfig, fields, where)
