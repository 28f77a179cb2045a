"""The page: one HTML file, nothing to load from anywhere, readable in light and dark and on a phone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from score_vllm.train.report.charts import MOST_POINTS, Line, chart, percent
from score_vllm.train.report.history import History
from score_vllm.train.report.measure import ALL, METHODS, NONE, OVER_TIME, PLACES, RATIOS, Findings, Key, Sheet

NAMES = {"score": "this policy"}
COLOURS = {"score": "c1", "vidcom2": "c2", "uniform": "c3", "random": "c4"}
# A difference is called one above this many of its standard errors.
CLEAR = 2.0
LONGEST_TEXT = 600


def page(
    name: str,
    history: History,
    findings: Findings | None,
    problem: str,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """The whole document.

    Args:
        name: of the run.
        history: of its steps.
        findings: what was measured; None: nothing was.
        problem: why nothing was, or what went wrong in the run.
        settings: of the run, as JSON.
        provenance: of the policy, flat.
    """
    parts = [f"<h1>Training report <span>{escape(name)}</span></h1>", _facts(history, findings)]
    parts += [f'<p class="bad">{escape(text)}</p>' for text in (history.diagnosis, problem) if text]
    if findings and findings.clips:
        parts += _section("Beside the baselines", [_against(findings)])
        parts += _section("What it keeps", [_keeps(findings)])
    curves = history.curves()
    if curves:
        bands = "Lines are means of neighbouring steps, bands their range. " if len(history.steps) > MOST_POINTS else ""
        parts += _section("Training", [f"<p>{bands}One point is the mean over the step's videos.</p>", _grid(curves)])
    made = [_table(["", ""], [[key, str(value)] for key, value in provenance.items()], plain=True)]
    made.append(f"<details><summary>Settings</summary><pre>{escape(json.dumps(settings, indent=1))}</pre></details>")
    parts += _section("How it was made", made)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{"".join(parts)}</body></html>'
    )


def verdicts(findings: Findings) -> list[str]:
    """Per ratio one sentence: the policy beside the best baseline and beside all tokens."""
    said = []
    for ratio in RATIOS:
        mine = findings.cross_entropy["score", ratio]
        best = min((m for m in METHODS if m != "score"), key=lambda m: _mean(findings.cross_entropy[m, ratio]))
        mean, error = paired(mine, findings.cross_entropy[best, ratio])
        clear = error is not None and abs(mean) > CLEAR * error
        word = "beside" if error is None else "level with" if not clear else "behind" if mean > 0 else "ahead of"
        said.append(
            f"At {percent(ratio)}: {_mean(mine):.3f} nats per token, {word} the best baseline here, {best} "
            f"({_signed(mean, error)}); all tokens {_mean(findings.cross_entropy[ALL]):.3f}."
        )
    return said


def paired(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference over clips and its standard error; None with fewer than three clips."""
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 2 else None
    return _mean(differences), error


def summary(findings: Findings) -> list[str]:
    """Lines for the terminal: mean cross-entropy per method and ratio."""
    clips = f"{findings.clips} clips{' that training saw, too' if findings.seen else ''}"
    lines = [f"measured {clips}, cross-entropy with all tokens {_mean(findings.cross_entropy[ALL]):.3f}"]
    for method in METHODS:
        cells = (f"{percent(ratio)}: {_mean(findings.cross_entropy[method, ratio]):.3f}" for ratio in RATIOS)
        lines.append(f"         {NAMES.get(method, method):<11} {', '.join(cells)}")
    return lines


def _facts(history: History, findings: Findings | None) -> str:
    tiles = [("steps", f"{history.steps[-1]['step']:,}" if history.steps else "0"), ("training", _duration(history))]
    if findings and findings.clips:
        ce = {key: _mean(values) for key, values in findings.cross_entropy.items()}
        tiles.append(("cross-entropy at 10 %", f"{ce['score', 0.1]:.3f}"))
        tiles.append(("with all tokens", f"{ce[ALL]:.3f}"))
        if findings.accuracy:
            tiles.append(("right answers at 10 %", percent(_mean(findings.accuracy["score", 0.1]))))
            tiles.append(("with all tokens", percent(_mean(findings.accuracy[ALL]))))
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _duration(history: History) -> str:
    seconds = history.seconds
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _against(findings: Findings) -> str:
    source = (
        "clips that training used, too: too good for new ones" if findings.seen else "clips that training did not use"
    )
    about = f"{findings.clips} {source}"
    charts = [_ratios("Cross-entropy, nats per target token", findings.cross_entropy)]
    tables = [
        _numbers(
            findings.cross_entropy,
            1.0,
            3,
            "Cross-entropy (in brackets the policy's minus this: below 0 the policy is better)",
        )
    ]
    if findings.accuracy:
        charts.append(_ratios("Questions answered exactly right", findings.accuracy, share=True))
        about += f"; {findings.questions} questions"
        tables.append(_numbers(findings.accuracy, 100.0, 1, "Right answers, % (in brackets the policy's minus this)"))
    sentences = "".join(f"<li>{escape(text)}</li>" for text in verdicts(findings))
    note = (
        f"{about}. ± is the standard error over clips alone; random is one draw. Measured in {findings.seconds:.0f} s."
    )
    return f"<ul>{sentences}</ul>{_grid(charts)}{''.join(tables)}<p>{escape(note)}</p>"


def _ratios(title: str, values: Mapping[Key, list[float]], share: bool = False) -> str:
    def line(label: str, keys: Iterable[Key], colour: str, dashed: bool = False) -> Line:
        means = [(ratio, _mean(values[method, ratio])) for method, ratio in keys]
        points = [(x, y) for x, y in sorted(means) if math.isfinite(y)]
        return Line(label, points, colour, dashed, dots=not dashed)

    lines = [line(NAMES.get(m, m), [(m, r) for r in RATIOS], COLOURS[m]) for m in reversed(METHODS)]
    # Without any token the loss is so far off that the methods would lie on one line.
    for key, colour in ((ALL, "c0"), (NONE, "c5"))[: 2 if share else 1]:
        level = _mean(values[key])
        if math.isfinite(level):
            lines.append(Line(key[0], [(min(RATIOS), level), (max(RATIOS), level)], colour, dashed=True))
    kwargs: dict[str, Any] = {"write_y": percent} if share else {}
    return chart(title, lines, "kept", write_x=percent, log_x=True, ticks_x=RATIOS, **kwargs)


def _numbers(values: Mapping[Key, list[float]], factor: float, digits: int, title: str) -> str:
    rows = []
    for method in METHODS:
        cells = []
        for ratio in RATIOS:
            text = f"{factor * _mean(values[method, ratio]):.{digits}f}"
            if method != "score":
                mean, error = paired(values["score", ratio], values[method, ratio])
                text += f" ({_signed(factor * mean, None if error is None else factor * error, digits)})"
            cells.append(text)
        rows.append([NAMES.get(method, method), *cells])
    both = f"all tokens {factor * _mean(values[ALL]):.{digits}f}, none {factor * _mean(values[NONE]):.{digits}f}"
    return f"<h3>{escape(title)}; {both}</h3>" + _table(["", *(f"{percent(r)} kept" for r in RATIOS)], rows)


def _keeps(findings: Findings) -> str:
    places = [(i + 0.5) / PLACES for i in range(PLACES)]
    lines = [
        Line(
            NAMES.get(m, m),
            list(zip(places, (findings.over_time[m] / findings.clips).tolist(), strict=True)),
            COLOURS[m],
        )
        for m in reversed(METHODS)
        if m != "random"
    ]
    over_time = chart(
        f"Share of each cell that is kept, at {percent(OVER_TIME)} in all",
        lines,
        "place in the clip, from its begin to its end",
        write_x=percent,
        write_y=percent,
        note=f"Mean over {findings.clips} clips.",
    )
    return _grid([over_time]) + "".join(map(_drawn, findings.sheets))


def _drawn(sheet: Sheet) -> str:
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{sheet.pictures["dark"]}">'
    size = f'width="{sheet.width}"'
    image = f'<img alt="kept tokens of {escape(sheet.name)}" {size} src="{sheet.pictures["light"]}">'
    words = f"<b>{escape(_cut(sheet.prompt))}</b> {escape(_cut(sheet.target))}"
    picture = f'<div class="wide"><picture>{dark}{image}</picture></div>'
    return f"<figure><h3>{escape(sheet.name)}</h3>{picture}<figcaption>{words}</figcaption></figure>"


def _section(title: str, parts: Iterable[str]) -> list[str]:
    return [f"<section><h2>{escape(title)}</h2>", *parts, "</section>"]


def _grid(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], plain: bool = False) -> str:
    head = "" if plain else f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr></thead>"
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _signed(mean: float, error: float | None, digits: int = 3) -> str:
    return f"{mean:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST_TEXT else flat[: LONGEST_TEXT - 1] + "…"
