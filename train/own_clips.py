"""Training on a folder of videos without texts: the frozen model describes them first, with all of their tokens."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from score_vllm.policy import RetentionPolicy
from score_vllm.train.annotate.log import write_lines
from score_vllm.train.config import OWN_FILES, TrainSettings
from score_vllm.train.data.clips import VIDEO_SUFFIXES, Clip, ClipReader
from score_vllm.train.data.config import JsonlConfig
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen.captioner import describe
from score_vllm.train.frozen.feature_cache import CachedSample
from score_vllm.train.frozen.model import FrozenVLM
from score_vllm.train.objective.rollout import noise_generator
from score_vllm.train.schema import ConfigurationError, MissingError
from score_vllm.train.step import sample_step

logger = logging.getLogger(__name__)

MIN_CLIPS = 4
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 8
# A warm-up clip has 2 to 4 stills of 3 to 6 frames.
_WARMUP_FRAMES = 13.5


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

    def describe(self, paths: list[Path], held_out: list[Path]) -> tuple[list[Described], dict[Path, str]]:
        """Describe this process's share of the clips.

        Args:
            paths: all clips.
            held_out: of these, those that get no stills.

        Returns:
            ``(described, unreadable)``: unreadable clips with the reason.
        """
        mine = paths[self._process :: self._processes]
        bar = tqdm(
            mine, desc="describing", unit="clip", disable=self._process > 0 or not self.settings.tracking.progress
        )
        found, unreadable = [], {}
        for path in bar:
            try:
                found.append(self.one(path, stills=path not in held_out))
            except BrokenSampleError as error:
                unreadable[path] = str(error)
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


def prepare(settings: TrainSettings, engine: FrozenVLM, accelerator: Any) -> list[Path]:
    """Describe all clips and write what the sources of the stages read.

    Returns:
        The held-out clips.

    Raises:
        ConfigurationError: too few clips can be read.
    """
    paths = find_clips(settings.clips)
    held_out = choose_held_out(paths, settings.seed)
    main = accelerator.is_main_process
    describer = ClipDescriber(settings, engine, accelerator.process_index, accelerator.num_processes)
    if main:
        for line in estimate(settings, describer, paths, accelerator.num_processes):
            print(line, flush=True)
    describer.describe(paths, held_out)
    accelerator.wait_for_everyone()
    if main:
        # Everything is known now, whoever described it: nothing is decoded but clips that cannot be.
        found, unreadable = ClipDescriber(quiet(settings), engine).describe(paths, held_out)
        train = [d for d in found if d.path not in held_out]
        if len(found) < MIN_CLIPS or not train:
            raise ConfigurationError(
                f"clips {settings.clips!r}: only {len(found)} of {len(paths)} videos can be used, at least {MIN_CLIPS} "
                f"are needed; {'; '.join(unreadable.values())}"
            )
        rows = [{"video": str(d.path), "prompt": settings.captions.prompt, "caption": d.text} for d in train]
        write_lines(describer.folder / OWN_FILES["jsonl"], rows)
        stills = [{"image": f"stills/{name}", "caption": said} for d in train for name, said in d.stills.items()]
        write_lines(describer.folder / OWN_FILES["stills"], stills)
        print(f"clips    {len(train)} to train on, {len(found) - len(train)} held out, {len(unreadable)} unreadable")
        for path, reason in unreadable.items():
            print(f"         {path}: {reason}")
        for described in found[:3]:
            print(f"         {described.path.name}: {' '.join(described.text.split())[:160]}")
    accelerator.wait_for_everyone()
    return held_out


def quiet(settings: TrainSettings) -> TrainSettings:
    """The same settings without a progress bar."""
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"progress": False})})


def choose_held_out(paths: list[Path], seed: int) -> list[Path]:
    """A tenth of the clips, one at least and eight at most, by a seeded hash of their names."""
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(paths))))
    return sorted(paths, key=lambda p: hashlib.sha256(f"{seed}:{p.name}".encode()).digest())[:count]


def estimate(settings: TrainSettings, describer: ClipDescriber, paths: list[Path], processes: int) -> Iterator[str]:
    """Time and memory of the whole run, from one clip: it is described, and a group of rollouts is run on it.

    Yields:
        Lines to print.
    """
    engine, ask = describer.engine, settings.captions
    for path in paths:
        try:
            started = time.perf_counter()
            clip = describer.reader.read(path, path.name)
            encoded = engine.encode(TrainingSample(path.name, clip.frames, clip.fps, ask.prompt, "-"))
            text = describe(engine, encoded, ask.max_tokens)
            to_describe = time.perf_counter() - started
            encoded = engine.encode(TrainingSample(path.name, clip.frames, clip.fps, ask.prompt, text))
        except BrokenSampleError:
            continue
        break
    else:
        return
    policy = RetentionPolicy(engine.hidden_size, settings.policy.width or None).to(engine.device)
    started = time.perf_counter()
    base = float(engine.cross_entropy(encoded, [torch.arange(encoded.num_tokens)])[0])
    item, noise = CachedSample(encoded, base), noise_generator(0, "estimate", 0)
    sample_step(policy, engine, item, settings.rollout, settings.stages[-1].tau, noise)
    to_step = time.perf_counter() - started
    per_step = settings.optimizer.samples_per_step * to_step
    asked = describer.missing(paths) * (1 + ask.stills * 0.5) * to_describe / processes
    yield (
        f"estimate from {path.name} ({len(clip.frames)} frames, {encoded.num_tokens} tokens): {to_describe:.1f} s to "
        f"describe, {to_step:.1f} s for its {settings.rollout.group_size} rollouts"
    )
    parts = [f"descriptions {_duration(asked)}"]
    for stage in settings.stages:
        share = min(1.0, _WARMUP_FRAMES / len(clip.frames)) if stage.sources[0].kind == "stills" else 1.0
        parts.append(f"{stage.name} {_duration(stage.steps * per_step * share)}")
    yield f"         {', '.join(parts)}; {memory(engine, policy)}"
    cached = (
        f" and up to {settings.cache.max_gib:g} GiB of features in memory" if settings.cache.kind == "memory" else ""
    )
    yield f"         more where clips are longer than this one{cached}"


def memory(engine: FrozenVLM, policy: RetentionPolicy) -> str:
    """Peak so far, with the optimiser's state that is still to come."""
    coming = 3 * 4 * sum(p.numel() for p in policy.parameters())
    if engine.device.type == "cuda":
        total = torch.cuda.get_device_properties(engine.device).total_memory
        peak = torch.cuda.max_memory_allocated(engine.device) + coming
        return f"{peak / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + coming
    return f"{peak / 2**30:.1f} GiB of memory"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _reader(settings: TrainSettings) -> ClipReader:
    """Reads clips as the main stage's source does."""
    specs = [spec for stage in settings.stages for spec in stage.sources if isinstance(spec, JsonlConfig)]
    if not specs:
        raise ConfigurationError(
            "clips needs a source of kind 'jsonl' in one of the stages; see configs/own_clips.toml"
        )
    return ClipReader(specs[0].fps, specs[0].max_frames, specs[0].max_pixels)


def report(settings: TrainSettings, engine: FrozenVLM, held_out: list[Path]) -> None:
    """Draw what the policy keeps of the held-out clips, and say what that costs their descriptions.

    Pictures go to ``<output>/held_out``; a row of the table is the mean cross-entropy, nats per token.
    """
    from score_vllm import select_tokens
    from score_vllm.viz.draw import draw

    policy = RetentionPolicy.from_pretrained(Path(settings.output) / "policy").to(engine.device)
    describer = ClipDescriber(quiet(settings), engine)
    described, _ = describer.describe(held_out, held_out)
    folder = Path(settings.output) / "held_out"
    folder.mkdir(parents=True, exist_ok=True)
    ratios, names = (0.25, 0.1), ("score", "uniform", "random")
    base, ce = [], {(name, ratio): [] for name in names for ratio in ratios}  # type: ignore[var-annotated]
    for item in described:
        clip = describer.reader.read(item.path, item.path.name)
        encoded = engine.encode(
            TrainingSample(item.path.name, clip.frames, clip.fps, settings.captions.prompt, item.text)
        )
        base.append(float(engine.cross_entropy(encoded, [torch.arange(encoded.num_tokens)])[0]))
        shown = {}
        for name, ratio in ce:
            selection = select_tokens(encoded.x, ratio, name, policy if name == "score" else None)
            ce[name, ratio].append(float(engine.cross_entropy(encoded, [selection.indices.cpu()])[0]))
            if name == "score":
                shown[f"policy, {ratio:.0%}"] = replace(selection, indices=selection.indices.cpu())
        print(f"picture  {draw(folder / f'{item.path.stem}.png', clip.frames, encoded.grid, shown)}")
    if not base:
        print("held out no clip can be read")
        return
    print(f"held out {len(base)} clips, cross-entropy of their descriptions; all tokens: {np.mean(base):.3f}")
    for name in names:
        cells = ", ".join(f"{ratio:.0%} kept: {np.mean(ce[name, ratio]):.3f}" for ratio in ratios)
        print(f"         {'this policy' if name == 'score' else name:<11} {cells}")
