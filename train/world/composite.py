"""Real footage with events pasted on that only time tells apart from what stands still beside them.

Coloured shapes come: they cross the picture, or come and go, once or twice; letters flash for two frames. Look-alikes
of both stand there from the first frame to the last and are never asked about, so that one frame does not say what
came. Everything is a function of (split, index) and the backgrounds; held-out backgrounds are whole other clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from score_vllm.train.world.scenes import DIRECTIONS, NUMBERS, Question, claim

SIZE, GRID = 112, 8
PATCH = SIZE // GRID
NUM_FRAMES, FPS = 16, 2.0
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 70, 235),
    "yellow": (245, 225, 30),
    "magenta": (225, 50, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
LETTERS = ("A", "C", "H", "L", "T", "X")
PLATE = 34
TIMES = {1: "once", 2: "twice"}
MOST_CLUTTER = 4
# Classes of what a patch shows: 0 the footage, then shapes by colour, then letters.
CLASSES = 1 + len(SHAPES) * len(COLOURS) + len(LETTERS)


@dataclass(frozen=True)
class Figure:
    """A shape, or a letter on a plate.

    Attributes:
        look: name of the shape, or the letter.
        colour: of a shape; empty for a letter.
        size: of its box, pixels.
        spans: frames ``[start, stop)`` in which it is seen.
        x, y: left and top of its box when it is first seen, pixels.
        direction: out of ``DIRECTIONS``.
        speed: pixels per frame.
    """

    look: str
    colour: str
    size: int
    spans: tuple[tuple[int, int], ...]
    x: float
    y: float
    direction: str = "still"
    speed: float = 0.0

    def box(self, frame: int) -> tuple[int, int]:
        """Left and top at a frame, pixels."""
        dx, dy = DIRECTIONS[self.direction]
        moved = self.speed * (frame - self.spans[0][0])
        return round(self.x + dx * moved), round(self.y + dy * moved)

    @property
    def label(self) -> int:
        """Its class, see :data:`CLASSES`."""
        if not self.colour:
            return 1 + len(SHAPES) * len(COLOURS) + LETTERS.index(self.look)
        return 1 + SHAPES.index(self.look) * len(COLOURS) + list(COLOURS).index(self.colour)


@dataclass(frozen=True)
class Composite:
    """All that is to be seen in one clip.

    Attributes:
        background: its name.
        seed: of the view on it, and of shades.
        num_frames: F.
        clutter: what stands still all along.
        things: shapes that come, in that order; no two share a shape or a colour.
        flashes: letters, in their order; no two alike.
    """

    background: str
    seed: int
    num_frames: int
    clutter: tuple[Figure, ...]
    things: tuple[Figure, ...]
    flashes: tuple[Figure, ...]


def make_composite(
    rng: np.random.Generator, names: Sequence[str], num_frames: int = NUM_FRAMES, clutter: int | None = None
) -> Composite:
    """A random clip: one to three shapes that come, up to two flashes, and look-alikes that stand still.

    Args:
        rng: consumed.
        names: of the backgrounds to choose from.
        num_frames: F, at least 16; events are as many and as long whatever it is.
        clutter: how many look-alikes are tried for; None: up to four.
    """
    background = str(names[int(rng.integers(len(names)))])
    taken: list[tuple[int, int, np.ndarray]] = []
    shapes, colours, letters = rng.permutation(SHAPES), rng.permutation(list(COLOURS)), rng.permutation(LETTERS)
    things: list[Figure] = []
    for i in range(int(rng.integers(1, 4))):
        for _ in range(20):
            thing = _random_thing(rng, str(shapes[i]), str(colours[i]), num_frames)
            apart = all(abs(thing.spans[0][0] - other.spans[0][0]) >= 2 for other in things)
            if apart and _claimed(taken, thing):
                things.append(thing)
                break
    flashes: list[Figure] = []
    for i in range(int(rng.integers(0, 3))):
        for _ in range(20):
            start = int(rng.integers(1, num_frames - 2))
            flash = Figure(str(letters[i]), "", PLATE, ((start, start + 2),), *_place(rng, PLATE))
            apart = all(abs(start - other.spans[0][0]) >= 4 for other in flashes)
            if apart and _claimed(taken, flash):
                flashes.append(flash)
                break
    pairs = {(thing.look, thing.colour) for thing in things}
    still: list[Figure] = []
    for i in range(int(rng.integers(MOST_CLUTTER + 1)) if clutter is None else clutter):
        # There may be no room; asked for a number, look longer.
        for _ in range(30 if clutter is None else 100):
            if i % 3 == 2:
                look, colour, size = str(rng.choice(LETTERS)), "", PLATE
            else:
                look, colour, size = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), int(rng.integers(22, 31))
            figure = Figure(look, colour, size, ((0, num_frames),), *_place(rng, size))
            if (look, colour) not in pairs and _claimed(taken, figure):
                still.append(figure)
                break
    things.sort(key=lambda thing: (thing.spans[0][0], SHAPES.index(thing.look)))
    flashes.sort(key=lambda flash: flash.spans[0][0])
    return Composite(background, int(rng.integers(2**62)), num_frames, tuple(still), tuple(things), tuple(flashes))


def _place(rng: np.random.Generator, size: int) -> tuple[float, float]:
    x, y = rng.integers(0, SIZE - size + 1, 2)
    return float(x), float(y)


def _random_thing(rng: np.random.Generator, shape: str, colour: str, num_frames: int) -> Figure:
    size = int(rng.integers(22, 31))
    x, y = _place(rng, size)
    kind = rng.random()
    if kind < 0.5:
        length = int(rng.integers(5, 9))
        start = int(rng.integers(1, num_frames - length + 1))
        direction = str(rng.choice([name for name in DIRECTIONS if name != "still"]))
        travel = float(rng.uniform(0.75, 1.0)) * (SIZE - size)
        first = float(rng.uniform(0, SIZE - size - travel))
        dx, dy = DIRECTIONS[direction]
        begin = first if dx + dy > 0 else first + travel
        x, y = (begin, y) if dx else (x, begin)
        return Figure(shape, colour, size, ((start, start + length),), x, y, direction, travel / (length - 1))
    if kind < 0.75:
        length = int(rng.integers(3, 7))
        start = int(rng.integers(1, num_frames - length + 1))
        return Figure(shape, colour, size, ((start, start + length),), x, y)
    length = int(rng.integers(2, 4))
    # Away for three frames at least, so that it has gone before it is there again.
    start = int(rng.integers(1, num_frames - 2 * length - 3 + 1))
    again = int(rng.integers(start + length + 3, num_frames - length + 1))
    return Figure(shape, colour, size, ((start, start + length), (again, again + length)), x, y)


def _claimed(taken: list[tuple[int, int, np.ndarray]], figure: Figure) -> bool:
    """Reserve a figure's boxes from its first frame to its last, gaps included."""
    start, stop = figure.spans[0][0], figure.spans[-1][1]
    corners = np.array([figure.box(frame) for frame in range(start, stop)])
    return claim(taken, start, stop, np.concatenate([corners, corners + figure.size], axis=1))


def caption(scene: Composite) -> str:
    """All that came, in order: shapes, then flashes."""
    sentences = []
    for thing in scene.things:
        name = f"A {thing.colour} {thing.look}"
        if thing.direction != "still":
            sentences.append(f"{name} moves {thing.direction}.")
        else:
            sentences.append(f"{name} comes {TIMES[len(thing.spans)]}.")
    if scene.flashes:
        sentences.append("The letter " + ", then ".join(flash.look for flash in scene.flashes) + " flashes.")
    return " ".join(sentences)


def questions(scene: Composite, rng: np.random.Generator) -> list[Question]:
    """Every question that a clip answers, in random order; ``kind`` is what it is about."""
    found = []
    for thing in scene.things:
        found.append(Question("colour", f"What colour is the {thing.look} that came?", thing.colour))
        found.append(Question("shape", f"Which shape is the {thing.colour} thing that came?", thing.look))
        found.append(Question("direction", f"How does the {thing.look} move?", thing.direction))
        if thing.direction == "still":
            times = TIMES[len(thing.spans)]
            found.append(Question("again", f"How often does the {thing.look} come?", times))
    thing = scene.things[int(rng.integers(len(scene.things)))]
    found.append(Question("came", f"Did a {thing.colour} {thing.look} come?", "yes"))
    there = [(figure.look, figure.colour) for figure in scene.clutter if figure.colour]
    have = {(thing.look, thing.colour) for thing in scene.things}
    others = there or [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in have]
    look, colour = others[int(rng.integers(len(others)))]
    found.append(Question("came", f"Did a {colour} {look} come?", "no"))
    found.append(Question("count", "How many shapes came?", NUMBERS[len(scene.things)]))
    if len(scene.things) > 1:
        found.append(Question("order", "Which shape came first?", scene.things[0].look))
        found.append(Question("order", "Which shape came last?", scene.things[-1].look))
    if len(scene.flashes) == 1:
        found.append(Question("flash", "Which letter flashed?", scene.flashes[0].look))
    elif scene.flashes:
        found.append(Question("flash order", "Which letter flashed first?", scene.flashes[0].look))
        found.append(Question("flash order", "Which letter flashed last?", scene.flashes[1].look))
    return [found[i] for i in rng.permutation(len(found))]
