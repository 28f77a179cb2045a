"""Training on a folder of videos without texts: the frozen model describes them first, with all of their tokens."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from score_vllm.train.annotate.log import write_lines
from score_vllm.train.config import OWN_FILES, OWN_HELD_OUT, TrainSettings
from score_vllm.train.data.clips import VIDEO_SUFFIXES, Clip, ClipReader
from score_vllm.train.data.config import JsonlConfig
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen.captioner import describe
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.schema import ConfigurationError, MissingError

logger = logging.getLogger(__name__)

MIN_CLIPS = 4
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 8


def find_clips(folder: str) -> list[Path]:
    """Videos in a folder and below it.

    Raises:
        ConfigurationError: no such folder, or too few videos in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise MissingError(f"clips {folder!r} is not a folder")
    found = sorted(p.absolute() for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if len(found) < MIN_CLIPS:
        raise ConfigurationError(
            f"clips {folder!r} holds {len(found)} videos ({', '.join(VIDEO_SUFFIXES)}), at least {MIN_CLIPS} are needed"
        )
    return found


@dataclass(frozen=True)
class Described:
    """A clip with its description; ``stills`` are descriptions of single frames by the name of their picture."""

    path: Path
    text: str
    stills: dict[str, str]


class ClipDescriber:
    """Describes clips once: each description is on disk before the next one is made.

    Args:
        settings: with ``clips``.
        engine: the frozen model.
        process, processes: this process's number of all; each describes its share.
    """

    def __init__(self, settings: TrainSettings, engine: FrozenVLM, process: int = 0, processes: int = 1) -> None:
        self.settings, self.engine = settings, engine
        self._process, self._processes = process, processes
        self.folder = settings.described
        self.reader = _reader(settings)
        self._known: dict[str, str] = {}
        self._load()

    def missing(self, paths: list[Path]) -> int:
        """Clips that are not described yet."""
        return sum(self._key(path, "clip") not in self._known for path in paths)

    def describe(
        self, paths: list[Path], held_out: list[Path], *, quiet: bool = False
    ) -> tuple[list[Described], dict[Path, str]]:
        """Describe this process's share of the clips.

        Args:
            paths: all clips.
            held_out: of these, those that get no stills.
            quiet: no progress bar and no warnings.

        Returns:
            ``(described, unreadable)``: unreadable clips with the reason.
        """
        mine = paths[self._process :: self._processes]
        shown = self._process == 0 and self.settings.tracking.progress and not quiet
        bar = tqdm(mine, desc="describing", unit="clip", disable=not shown)
        found, unreadable = [], {}
        for path in bar:
            try:
                found.append(self.one(path, stills=path not in held_out))
            except BrokenSampleError as error:
                unreadable[path] = str(error)
                if not quiet:
                    logger.warning("skipped a clip: %s", error)
        return found, unreadable

    def one(self, path: Path, stills: bool) -> Described:
        """One clip; nothing is decoded where all of it is described.

        Raises:
            BrokenSampleError: it cannot be read, or the model has nothing to say.
        """
        ask = self.settings.captions
        names = {f"{self._key(path, f'still {n}')[:24]}.png": n for n in range(ask.stills)} if stills else {}
        clip: Clip | None = None

        def frames() -> Clip:
            nonlocal clip
            clip = clip or self.reader.read(path, path.name)
            return clip

        text = self._known.get(self._key(path, "clip"))
        if text is None:
            text = self._ask(path, "clip", frames(), ask.prompt)
        spoken = {}
        for name, number in names.items():
            what, picture = f"still {number}", self.folder / "stills" / name
            said = self._known.get(self._key(path, what))
            if said is None or not picture.is_file():
                at = int((number + 0.5) * len(frames().frames) / ask.stills)
                still = frames().frames[at]
                picture.parent.mkdir(parents=True, exist_ok=True)
                aside = picture.with_suffix(".part")
                Image.fromarray(still).save(aside, "PNG")
                aside.replace(picture)
                said = self._ask(path, what, Clip(np.stack([still, still]), frames().fps), ask.still_prompt)
            spoken[name] = said
        return Described(path, text, spoken)

    def _ask(self, path: Path, what: str, clip: Clip, prompt: str) -> str:
        sample = TrainingSample(path.name, clip.frames, clip.fps, prompt, "-")
        text = describe(self.engine, self.engine.encode(sample), self.settings.captions.max_tokens)
        key = self._key(path, what)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"log-{self._process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "video": str(path), "what": what, "text": text}) + "\n")
        self._known[key] = text
        return text

    def _key(self, path: Path, what: str) -> str:
        """What a description depends on: the file, the question, the model, and how the file is read."""
        stat, ask, reader = path.stat(), self.settings.captions, self.reader
        facts = [str(path), stat.st_size, stat.st_mtime_ns, what, ask.model_dump(), self.engine.identity]
        facts += [reader.fps, reader.max_frames, reader.max_pixels]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _load(self) -> None:
        for file in self.folder.glob("log-*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = row["text"]
                except (ValueError, KeyError, TypeError):  # the line that a kill cut short
                    continue


def prepare(settings: TrainSettings, describer: ClipDescriber, paths: list[Path], accelerator: Any) -> None:
    """Describe all clips and write what the sources of the stages, and the report, read.

    Args:
        settings: with ``clips``.
        describer: of this process.
        paths: from :func:`find_clips`.
        accelerator: all processes call this together.

    Raises:
        ConfigurationError: too few clips can be read.
    """
    held_out = choose_held_out(paths, settings.seed)
    describer.describe(paths, held_out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Everything is known now, whoever described it: nothing is decoded but clips that cannot be.
        found, unreadable = ClipDescriber(settings, describer.engine).describe(paths, held_out, quiet=True)
        train = [d for d in found if d.path not in held_out]
        if len(found) < MIN_CLIPS or not train:
            raise ConfigurationError(
                f"clips {settings.clips!r}: only {len(found)} of {len(paths)} videos can be used, at least {MIN_CLIPS} "
                f"are needed; {'; '.join(unreadable.values())}"
            )
        for name, part in ((OWN_FILES["jsonl"], train), (OWN_HELD_OUT, [d for d in found if d.path in held_out])):
            rows = [{"video": str(d.path), "prompt": settings.captions.prompt, "caption": d.text} for d in part]
            write_lines(describer.folder / name, rows)
        stills = [{"image": f"stills/{name}", "caption": said} for d in train for name, said in d.stills.items()]
        write_lines(describer.folder / OWN_FILES["stills"], stills)
        print(f"clips    {len(train)} to train on, {len(found) - len(train)} held out, {len(unreadable)} unreadable")
        for reason in unreadable.values():
            print(f"         {reason}")
        for described in found[:3]:
            print(f"         {described.path.name}: {' '.join(described.text.split())[:160]}")
    accelerator.wait_for_everyone()


def choose_held_out(paths: list[Path], seed: int) -> list[Path]:
    """A tenth of the clips, one at least and eight at most, by a seeded hash of their names."""
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(paths))))
    return sorted(paths, key=lambda p: hashlib.sha256(f"{seed}:{p.name}".encode()).digest())[:count]


def _reader(settings: TrainSettings) -> ClipReader:
    """Reads clips as the main stage's source does."""
    specs = [spec for stage in settings.stages for spec in stage.sources if isinstance(spec, JsonlConfig)]
    if not specs:
        raise ConfigurationError(
            "clips needs a source of kind 'jsonl' in one of the stages; see configs/own_clips.toml"
        )
    return ClipReader(specs[0].fps, specs[0].max_frames, specs[0].max_pixels)
