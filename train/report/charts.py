"""Line charts as SVG inside the page: colours come from its style sheet, so that they fit light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# In units of the drawing, which is as wide as its place on the page.
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 18, 34
MOST_POINTS = 80


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend.
        points: ``(x, y)``, x ascending.
        colour: name of a colour of the style sheet.
        dashed: drawn so.
        band: ``(low, high)`` around each point; empty for none.
        dots: mark every point.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    band: Sequence[tuple[float, float]] = ()
    dots: bool = False


def binned(label: str, steps: Sequence[float], values: Sequence[float | None], colour: str) -> Line:
    """Many values as few points: the mean of each bin, with the range of its values as band."""
    known = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None]
    size = max(1, math.ceil(len(known) / MOST_POINTS))
    points, band = [], []
    for first in range(0, len(known), size):
        xs, ys = zip(*known[first : first + size], strict=True)
        points.append((sum(xs) / len(xs), sum(ys) / len(ys)))
        band.append((min(ys), max(ys)))
    return Line(label, points, colour, band=band if size > 1 else ())


def short(value: float) -> str:
    """A number for an axis."""
    return f"{value:,.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2g}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share for an axis."""
    return f"{100 * value:.3g} %"


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    note: str = "",
    write_x: Callable[[float], str] = short,
    write_y: Callable[[float], str] = short,
    log_x: bool = False,
    ticks_x: Sequence[float] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with its title, legend and axes; empty where no line has a point.

    Args:
        title: in words, with the unit.
        lines: drawn in this order; what is not finite must not be in them.
        x_label: below the horizontal axis.
        note: a sentence below.
        write_x, write_y: numbers of the axes.
        log_x: a logarithmic horizontal axis.
        ticks_x: its numbers; empty chooses round ones.
        marks: vertical lines at ``x`` with a word, e.g. where a stage begins.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for pair in line.band for y in pair]
    low, high = min(ys), max(ys)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - (abs(low) * 0.1 or 0.1), high + (abs(high) * 0.1 or 0.1)
    steps_y = round_numbers(low, high)
    low, high = min(low, steps_y[0]), max(high, steps_y[-1])
    scale: Callable[[float], float] = math.log if log_x else float
    first, last = scale(min(xs)), scale(max(xs))

    def at_x(x: float) -> float:
        share = (scale(x) - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    base = HEIGHT - BOTTOM
    parts = []
    for y in steps_y:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4}" text-anchor="end">{escape(write_y(y))}</text>')
    for x in ticks_x or [x for x in round_numbers(min(xs), max(xs)) if min(xs) <= x <= max(xs)]:
        parts.append(f'<text x="{at_x(x)}" y="{base + 15}" text-anchor="middle">{escape(write_x(x))}</text>')
    for x, word in marks:
        parts.append(f'<path class="mark" d="M{at_x(x)} {TOP}V{base}"/>')
        parts.append(f'<text class="word" x="{at_x(x)}" y="{TOP - 6}">{escape(word)}</text>')
    for line in lines:
        if line.band:
            upper = [f"{at_x(x)} {at_y(pair[1])}" for (x, _), pair in zip(line.points, line.band, strict=True)]
            lower = [f"{at_x(x)} {at_y(pair[0])}" for (x, _), pair in zip(line.points, line.band, strict=True)]
            parts.append(f'<path class="band {line.colour}" d="M{"L".join(upper + lower[::-1])}Z"/>')
    for line in lines:
        path = "L".join(f"{at_x(x)} {at_y(y)}" for x, y in line.points)
        parts.append(f'<path class="line {line.colour}{" dashed" if line.dashed else ""}" d="M{path}"/>')
        for x, y in line.points if line.dots or len(line.points) == 1 else ():
            said = f"{line.label}: {write_y(y)} at {write_x(x)}"
            dot = f'<circle class="dot {line.colour}" cx="{at_x(x)}" cy="{at_y(y)}" r="3.5">'
            parts.append(f"{dot}<title>{escape(said)}</title></circle>")
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>'
    )
    swatch = '<i class="{0}{1}"></i>{2}'
    legend = [swatch.format(n.colour, " dashed" if n.dashed else "", escape(n.label)) for n in lines]
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    words = "".join(f"<span>{entry}</span>" for entry in legend)
    below = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure><h3>{escape(title)}</h3><p class="legend">{words}</p>{drawing}{below}</figure>'


def round_numbers(low: float, high: float, wanted: int = 4) -> list[float]:
    """About ``wanted`` round numbers that cover a range."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(n * step, 12) for n in range(first, last + 1)]
