"""The one writer of pictures: panels with lines, bars or stacked bars, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

GREY = "#333333"
COLOURS = ("#59a14f", "#4e79a7", "#e15759", "#f28e2b", "#b07aa1", "#9c755f", "#edc948", "#76b7b2", "#ff9da7", "#bab0ac")


@dataclass(frozen=True)
class Series:
    """One line, or one colour of bars.

    Attributes:
        label: in the legend.
        values: heights, one per place.
        places: of a line's points; bars stand at the panel's labels.
        spread: error bars of a line.
        texts: written at the ends of bars.
        style: matplotlib's arguments.
    """

    label: str
    values: Sequence[float]
    places: Sequence[float] = ()
    spread: Sequence[float] | None = None
    texts: Sequence[str] = ()
    style: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: above it.
        series: drawn in this order.
        labels: names of the bars' places; empty for lines.
        kind: "line", "bar" (series side by side) or "stack" (horizontal, series on top of each other).
        x: label of the horizontal axis.
        ticks: of a horizontal axis in powers of two.
        log: a logarithmic vertical axis.
    """

    title: str
    series: Sequence[Series]
    labels: Sequence[str] = ()
    kind: str = "line"
    x: str = ""
    ticks: Sequence[int] = ()
    log: bool = False


def png(title: str, panels: Sequence[Panel], digest: str, size: tuple[float, float]) -> bytes:
    """Panels side by side.

    Args:
        title: of the whole picture.
        panels: at least one.
        digest: of the results that are drawn; stored in the PNG, by which the report sees an old picture.
        size: inches.

    Raises:
        ImportError: matplotlib is not installed (extra ``bench``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=90, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        {"line": _lines, "bar": _bars, "stack": _stack}[panel.kind](axes, panel)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.series) > 1:
            axes.legend(fontsize=8, ncols=2 if len(panel.series) > 6 else 1, frameon=False)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Results": digest, "Software": None})
    return buffer.getvalue()


def _lines(axes: Any, panel: Panel) -> None:
    for series in panel.series:
        style = {"marker": "o", "markersize": 4, **series.style}
        axes.errorbar(series.places, series.values, yerr=series.spread, capsize=3, label=series.label, **style)
    if panel.ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
        axes.tick_params(axis="x", which="minor", bottom=False)
    if panel.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)


def _bars(axes: Any, panel: Panel) -> None:
    width = 0.8 / len(panel.series)
    for number, series in enumerate(panel.series):
        places = [place + (number - (len(panel.series) - 1) / 2) * width for place in range(len(panel.labels))]
        axes.bar(places, series.values, width, label=series.label, **series.style)
        for place, value, text in zip(places, series.values, series.texts, strict=False):
            axes.text(place, value, text, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(panel.labels)), panel.labels, fontsize=8)


def _stack(axes: Any, panel: Panel) -> None:
    lefts = [0.0] * len(panel.labels)
    for series in panel.series:
        axes.barh(range(len(lefts)), series.values, left=lefts, label=series.label, height=0.66, **series.style)
        lefts = [left + value for left, value in zip(lefts, series.values, strict=True)]
        for place, left, text in zip(range(len(lefts)), lefts, series.texts, strict=False):
            axes.text(left, place, f"  {text}", va="center", fontsize=9)
    axes.set_yticks(range(len(lefts)), panel.labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(lefts) * 1.12)
