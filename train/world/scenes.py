"""A small synthetic world: seeded videos whose captions and questions are answered by few of their tokens.

On a textured ground, coloured shapes appear, move, stay and vanish; letters flash for one or two frames; the scene
is cut; leaves drift and water flickers without ever being asked about. Everything is a function of (split, index):
nothing is stored. :class:`PseudoWorldSource` makes the paper's warm-up clips (section 4.4) of the same things.

One file: scene, clip and questions are drawn from one generator, in an order that must not change.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from score_vllm.train.data.sample import TrainingSample
from score_vllm.train.schema import ConfigurationError

FRAME_SIZE = 224
FPS = 2.0
NUM_FRAMES = 32
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
LETTERS = ("A", "C", "E", "H", "K", "L", "M", "R", "T", "X")
DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
PLATE_SIZE = 42
# Nothing of one thing's box comes closer than this to another's, in pixels.
GAP = 4
# A still shape is asked for its place only where its centre is this far from both middle lines.
PLACE_MARGIN = 14


@dataclass(frozen=True)
class Thing:
    """A coloured shape.

    Attributes:
        shape, colour, direction: names from the tables above.
        size: of its box, pixels.
        start, stop: first frame, and one past the last, in which it is seen.
        x, y: left and top of its box at ``start``, pixels.
        speed: pixels per frame along ``direction``.
    """

    shape: str
    colour: str
    direction: str
    size: int
    start: int
    stop: int
    x: float
    y: float
    speed: float

    def box(self, frame: int) -> tuple[int, int]:
        """Left and top at a frame, pixels."""
        dx, dy = DIRECTIONS[self.direction]
        moved = self.speed * (frame - self.start)
        return round(self.x + dx * moved), round(self.y + dy * moved)

    @property
    def place(self) -> str | None:
        """Quarter of the picture in which a still shape stands; None where it moves or is near a middle line."""
        x, y = self.x + self.size / 2 - FRAME_SIZE / 2, self.y + self.size / 2 - FRAME_SIZE / 2
        if self.direction != "still" or min(abs(x), abs(y)) < PLACE_MARGIN:
            return None
        return PLACES[2 * (y > 0) + (x > 0)]


@dataclass(frozen=True)
class Flash:
    """A letter on a dark plate, seen for ``stop - start`` frames with its left top at (x, y)."""

    letter: str
    start: int
    stop: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """All that is to be seen in one clip; ``seed`` settles grounds, leaves and water.

    Attributes:
        cuts: frames at which the ground changes, ascending.
        texts: of a pseudo-video, the caption of each still; otherwise empty.
    """

    seed: int
    num_frames: int
    things: tuple[Thing, ...]
    flashes: tuple[Flash, ...]
    cuts: tuple[int, ...] = ()
    texts: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; ``kind`` is what it is about."""

    kind: str
    text: str
    answer: str


def make_scene(rng: np.random.Generator, num_frames: int = NUM_FRAMES) -> Scene:
    """A random scene: two to four shapes, up to three flashes, up to two cuts.

    Args:
        rng: consumed.
        num_frames: F, at least 6.

    Returns:
        The scene. No two shapes share a shape or a colour, no two flashes a letter; nothing covers another.

    Raises:
        ValueError: ``num_frames`` is below 6.
    """
    if num_frames < 6:
        raise ValueError(f"num_frames must be at least 6, got {num_frames}")
    taken: list[tuple[int, int, np.ndarray]] = []
    things: list[Thing] = []
    shapes, colours = rng.permutation(SHAPES), rng.permutation(list(COLOURS))
    wanted = int(rng.integers(2, 5))
    for i in range(wanted):
        for _ in range(12):
            thing = _random_thing(rng, str(shapes[i]), str(colours[i]), num_frames)
            if claim(taken, thing.start, thing.stop, _boxes(thing)):
                things.append(thing)
                break
    flashes: list[Flash] = []
    letters = rng.permutation(LETTERS)
    # One frame apart at least two cells, so that their order can be seen.
    times = np.sort(rng.choice(np.arange(1, num_frames - 3, 4), size=min(3, (num_frames - 4) // 4 + 1), replace=False))
    for i, time in enumerate(times[rng.permutation(len(times)) < rng.integers(0, 4)]):
        start = int(time + rng.integers(0, 2))
        length = int(rng.integers(1, 3))
        for _ in range(12):
            x, y = (int(v) for v in rng.integers(0, FRAME_SIZE - PLATE_SIZE, 2))
            box = np.tile([[x, y, x + PLATE_SIZE, y + PLATE_SIZE]], (length, 1))
            if claim(taken, start, start + length, box):
                flashes.append(Flash(str(letters[i]), start, start + length, x, y))
                break
    cuts = np.sort(rng.choice(np.arange(3, num_frames - 2), size=int(rng.choice([0, 0, 1, 1, 2])), replace=False))
    ordered = tuple(sorted(things, key=lambda t: (t.start, SHAPES.index(t.shape))))
    return Scene(int(rng.integers(2**62)), num_frames, ordered, tuple(flashes), tuple(int(c) for c in cuts))


def make_pseudo_scene(rng: np.random.Generator) -> Scene:
    """A warm-up clip (paper section 4.4): 2-4 stills with a caption each.

    Each is repeated for 4 or 6 frames: of the paper's 3 to 6 those that the model's merge of two frames does not cut.
    """
    things: list[Thing] = []
    flashes: list[Flash] = []
    cuts: list[int] = []
    texts: list[str] = []
    frame = 0
    for _ in range(int(rng.integers(2, 5))):
        stop = frame + 2 * int(rng.integers(2, 4))
        taken: list[tuple[int, int, np.ndarray]] = []
        shapes, colours = rng.permutation(SHAPES), rng.permutation(list(COLOURS))
        still: list[Thing] = []
        for i in range(int(rng.integers(1, 4))):
            size = int(rng.integers(44, 62))
            for _ in range(12):
                x, y = (float(v) for v in rng.integers(0, FRAME_SIZE - size, 2))
                thing = Thing(str(shapes[i]), str(colours[i]), "still", size, frame, stop, x, y, 0.0)
                if claim(taken, frame, stop, _boxes(thing)):
                    still.append(thing)
                    break
        still.sort(key=lambda t: SHAPES.index(t.shape))
        texts.append(_sentence(" and ".join(_named(t) for t in still)) + ".")
        things += still
        if frame:
            cuts.append(frame)
        frame = stop
    return Scene(int(rng.integers(2**62)), frame, tuple(things), tuple(flashes), tuple(cuts), tuple(texts))


def caption(scene: Scene) -> str:
    """All facts of a scene in sentences: shapes in order of appearance, then flashes in theirs."""
    if scene.texts:
        return " ".join(scene.texts)
    sentences = []
    for thing in scene.things:
        if thing.direction != "still":
            sentences.append(f"{_sentence(_named(thing))} moves {thing.direction}.")
        elif thing.place:
            sentences.append(f"{_sentence(_named(thing))} stays at the {thing.place}.")
        else:
            sentences.append(f"{_sentence(_named(thing))} stays.")
    if scene.flashes:
        sentences.append("The letter " + ", then ".join(flash.letter for flash in scene.flashes) + " flashes.")
    return " ".join(sentences)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question that a scene answers, each in one random wording, in random order."""
    found: list[Question] = []

    def ask(kind: str, wordings: tuple[str, ...], answer: str) -> None:
        found.append(Question(kind, wordings[int(rng.integers(len(wordings)))], answer))

    for thing in scene.things:
        spelling = ("color", "colour")[int(rng.integers(2))]
        ask(
            "colour",
            (f"What {spelling} is the {thing.shape}?", f"Which {spelling} does the {thing.shape} have?"),
            thing.colour,
        )
        ask("shape", (f"Which shape is {thing.colour}?", f"What is the {thing.colour} shape?"), thing.shape)
        ask(
            "direction", (f"How does the {thing.shape} move?", f"Which way does the {thing.shape} go?"), thing.direction
        )
        if thing.place:
            ask("place", (f"Where is the {thing.shape}?", f"Where does the {thing.shape} stay?"), thing.place)
    ask("count", ("How many shapes are there?", "How many shapes does the video show?"), NUMBERS[len(scene.things)])
    ask("count", ("How many letters flash?", "How many letters are flashed?"), NUMBERS[len(scene.flashes)])
    if len(scene.flashes) == 1:
        ask("flash", ("Which letter flashes?", "What letter is flashed?"), scene.flashes[0].letter)
    elif scene.flashes:
        ask("order", ("Which letter flashes first?", "What is the first letter?"), scene.flashes[0].letter)
        ask("order", ("Which letter flashes last?", "What is the last letter?"), scene.flashes[-1].letter)
    return [found[i] for i in rng.permutation(len(found))]


CAPTION_PROMPTS = ("Describe the video.", "What happens in the video?", "What happens?")


def clip_rng(split: str, index: int, kind: str = "video") -> np.random.Generator:
    """Randomness of one clip; splits and kinds never share any."""
    return np.random.default_rng([zlib.crc32(f"{kind}:{split}".encode()), index])


def make_clip(split: str, index: int) -> tuple[Scene, list[Question]]:
    """Scene and questions of clip ``index`` of a split, the same on every machine."""
    rng = clip_rng(split, index)
    scene = make_scene(rng)
    return scene, questions(scene, rng)


@dataclass(frozen=True)
class WorldSource:
    """Videos with their captions as :class:`~score_vllm.train.data.sample.SampleSource`.

    Attributes:
        split: any name; ``held_out`` is the evaluation's and is refused.
        size: number of clips.
    """

    split: str = "policy"
    size: int = 10_000

    def __post_init__(self) -> None:
        if self.split == "held_out":
            raise ConfigurationError("split 'held_out' is for evaluation only; choose another name")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> TrainingSample:
        from score_vllm.train.world.render import render

        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        scene, _ = make_clip(self.split, index)
        return TrainingSample(f"world:{self.split}:{index}", render(scene).frames, FPS, *self.text(index))

    def text(self, index: int) -> tuple[str, str]:
        """Prompt and caption of a clip, without drawing it."""
        return CAPTION_PROMPTS[0], caption(make_clip(self.split, index)[0])

    def questions(self, index: int) -> Sequence[tuple[str, str, str]]:
        """See :class:`~score_vllm.train.data.sample.AskingSource`."""
        return [(q.kind, q.text, q.answer) for q in make_clip(self.split, index)[1]]


@dataclass(frozen=True)
class PseudoWorldSource(WorldSource):
    """Pseudo-videos of the paper's warm-up with their concatenated captions."""

    def __getitem__(self, index: int) -> TrainingSample:
        from score_vllm.train.world.render import render

        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        scene = make_pseudo_scene(clip_rng(self.split, index, "pseudo"))
        key = f"world-pseudo:{self.split}:{index}"
        return TrainingSample(key, render(scene).frames, FPS, CAPTION_PROMPTS[0], caption(scene))

    def text(self, index: int) -> tuple[str, str]:
        """Prompt and caption of a clip, without drawing it."""
        return CAPTION_PROMPTS[0], caption(make_pseudo_scene(clip_rng(self.split, index, "pseudo")))

    def questions(self, index: int) -> Sequence[tuple[str, str, str]]:
        """None."""
        return ()


def _named(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _random_thing(rng: np.random.Generator, shape: str, colour: str, num_frames: int) -> Thing:
    size = int(rng.integers(44, 62))
    if rng.random() < 0.5:
        start, stop = 0, num_frames
    else:
        length = int(rng.integers(6, max(7, num_frames * 3 // 4)))
        start = int(rng.integers(0, num_frames - length + 1))
        stop = start + length
    room = FRAME_SIZE - size
    x, y = (float(v) for v in rng.integers(0, room, 2))
    direction, speed = "still", 0.0
    if rng.random() < 0.5:
        direction = str(rng.choice(["left", "right", "up", "down"]))
        speed = min(float(rng.uniform(3.0, 6.0)), room / (stop - start))
        travel = speed * (stop - start - 1)
        first = float(rng.uniform(0, room - travel))
        dx, dy = DIRECTIONS[direction]
        if dx:
            x = first if dx > 0 else first + travel
        else:
            y = first if dy > 0 else first + travel
    return Thing(shape, colour, direction, size, start, stop, x, y, speed)


def _boxes(thing: Thing) -> np.ndarray:
    corners = np.array([thing.box(frame) for frame in range(thing.start, thing.stop)])
    return np.concatenate([corners, corners + thing.size], axis=1)


def claim(taken: list[tuple[int, int, np.ndarray]], start: int, stop: int, boxes: np.ndarray) -> bool:
    """Reserve boxes [frames, 4] unless one of them comes too close to a reserved one in the same frame."""
    for other_start, other_stop, other in taken:
        first, last = max(start, other_start), min(stop, other_stop)
        if first >= last:
            continue
        a, b = boxes[first - start : last - start], other[first - other_start : last - other_start]
        apart = (a[:, 0] >= b[:, 2] + GAP) | (b[:, 0] >= a[:, 2] + GAP)
        apart |= (a[:, 1] >= b[:, 3] + GAP) | (b[:, 1] >= a[:, 3] + GAP)
        if not apart.all():
            return False
    taken.append((start, stop, boxes))
    return True
