"""Files for the soak: good clips of the demo's world, and mutated ones of every container, drawn by hypothesis."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from score_vllm.train.data.clips import encode_mp4
from score_vllm.train.data.sources import open_source, source_config
from tests.video_clips import VIDEO_CONTAINERS
from tests.video_writing import Recipe, even, numbered, recipe, write

THEORA = Path(__file__).parents[2] / "tests" / "assets" / "theora.ogv"
PICTURES = 24
EDITS = ("flip", "overwrite", "zero", "delete", "repeat", "swap", "cut")


def good_clips(folder: Path, count: int) -> list[Path]:
    """Clips that the demo model knows: it is sure of its answers, whatever else is in its batch."""
    source = open_source(source_config(kind="world", split="soak", limit=count))
    paths = []
    for index in range(count):
        sample = source[index]
        paths.append(folder / f"good-{index:03d}.mp4")
        paths[-1].write_bytes(encode_mp4(sample.frames, sample.fps))
    return paths


def whole_clips() -> dict[str, bytes]:
    """One short clip of every container that is accepted."""
    stamps = even(PICTURES, 10)
    made = {name: write(recipe(name, stamps)) for name in VIDEO_CONTAINERS}
    others = {"3gp": "mpeg4", "mpeg": "mpeg2video", "flv": "flv", "asf": "wmv2", "apng": "apng"}
    for name, codec in others.items():
        made[name] = write(Recipe(name, codec, stamps, pix_fmt="rgb24" if codec == "apng" else "yuv420p"))
    made["ogg"] = THEORA.read_bytes()
    first, *rest = [Image.fromarray(numbered(number)) for number in range(PICTURES)]
    for name in ("webp", "avif"):
        sink = io.BytesIO()
        first.save(sink, name, save_all=True, append_images=rest, duration=100)
        made[name] = sink.getvalue()
    return made


def mutate(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Apply edits one after the other, each at its share of the file's length."""
    for name, share, content in edits:
        # Squared: the headers, which most files have in front, are met more often.
        at = int(share * share * len(data))
        stop = at + len(content)
        there = data[at:stop]
        if name == "flip":
            put = bytes(a ^ b for a, b in zip(there, content, strict=False))
        elif name == "swap":
            put = there[::-1]
        else:
            put = {"overwrite": content, "zero": bytes(len(there)), "repeat": there * 3}.get(name, b"")
        data = data[:at] + put + (b"" if name == "cut" else data[stop:])
    return data


def mutated_clips(folder: Path, count: int) -> list[Path]:
    """``count`` distinct damaged files, the containers in turn, with the same edits in every run."""
    whole, found = list(whole_clips().items()), dict[str, Path]()
    edit = st.tuples(st.sampled_from(EDITS), st.floats(0, 1), st.binary(min_size=1, max_size=256))
    batches: list[list[tuple[str, float, bytes]]] = []

    @seed(0)
    @settings(
        max_examples=2 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(edit, min_size=1, max_size=6))
    def collect(edits: list[tuple[str, float, bytes]]) -> None:
        batches.append(edits)

    collect()
    for edits in batches:
        name, data = whole[len(found) % len(whole)]
        changed = mutate(data, edits)
        digest = hashlib.sha256(changed).hexdigest()[:16]
        if changed != data and digest not in found and len(found) < count:
            found[digest] = folder / f"mutated-{len(found):03d}.{name}"
            found[digest].write_bytes(changed)
    if len(found) < count:
        raise RuntimeError(f"only {len(found)} of {count} distinct mutations were drawn")
    return list(found.values())
