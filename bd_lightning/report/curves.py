"""Curves as SVG, without scripts: colours come from the page's style, so that they follow light and dark mode."""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from bd_lightning.report.folder import Series

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
POINTS = 240
"""Longer curves are thinned to so many points, each the mean of those it stands for."""
SMOOTHED = 60
"""Longer curves are drawn faint, with a moving mean over them."""
COLOURS = 8


class Line(NamedTuple):
    """One curve.

    Args:
        name: what the legend calls it.
        series: its values.
        colour: number of its colour, from 0.
        opacity: of the line.
        dashed: as a dashed line.
    """

    name: str
    series: Series
    colour: int = 0
    opacity: float = 1.0
    dashed: bool = False


def number(value: float, digits: int | None = None) -> str:
    """A number as people read it."""
    if not math.isfinite(value):
        return str(value)
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


def thinned(series: Series, points: int = POINTS) -> Series:
    """At most about so many points, each the mean of neighbours; the last one is kept as it is."""
    size = math.ceil(len(series) / points)
    if size <= 1:
        return series
    parts = [series[i : i + size] for i in range(0, len(series), size)]
    means = [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in parts[:-1]]
    return [*means, series[-1]]


def smoothed(series: Series) -> Series:
    """The mean of each value and its neighbours, a thirtieth of the curve to either side."""
    half = len(series) // 30
    sums = [0.0, *itertools.accumulate(value for _, value in series)]
    windows = [(max(0, i - half), min(len(series), i + half + 1)) for i in range(len(series))]
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(series, windows)]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover an interval, about so many."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    places = 3 - math.floor(math.log10(step))
    return [round(k * step, places) for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis(NamedTuple):
    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        few = [10.0**p for p in powers]
        many = [k * 10.0**p for p in powers for k in (1, 2, 5)]
        inside = [v for v in few if self.low <= v <= self.high]
        return inside if len(inside) > 2 else [v for v in many if self.low <= v <= self.high]


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    log = low > 1e-300 and high / low > 20
    if log:
        return _Axis(low / 1.1, high * 1.1, True)
    room = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return _Axis(low - room, high + room, False)


def chart(title: str, lines: Sequence[Line], levels: Mapping[str, float] | None = None) -> str:
    """A figure of curves over optimiser steps.

    Args:
        title: its heading.
        lines: the curves.
        levels: values to draw as horizontal lines, by name.

    Returns:
        HTML: a <figure> with a legend, an SVG, and the last value of each curve.
    """
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    values = [value for line in lines for _, value in line.series]
    axis = _axis([*values, *levels.values()])
    steps = [step for line in lines for step, _ in line.series]
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.place(value))

    parts = []
    for tick in axis.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>')
    marks = [t for t in ticks(first, last) if t == round(t)] if last > first else [first]
    for tick in marks:
        anchor = "end" if x(tick) > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_short(tick)}</text>')
    for name, value in levels.items():
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{y(value) - 4:.1f}" text-anchor="end">{escape(name)} {number(value)}</text>'
        )
    parts += [_path(line, x, y) for line in lines]
    legend = "".join(
        f'<li><i class="c{line.colour % COLOURS}{" dashed" if line.dashed else ""}" style="opacity:{line.opacity:g}">'
        f"</i>{escape(line.name) if line.name != title else 'last'} <b>{number(line.series[-1][1])}</b></li>"
        for line in lines
    )
    scale = " <small>logarithmic</small>" if axis.log else ""
    return (
        f"<figure><figcaption>{escape(title)}{scale}</figcaption><ul>{legend}</ul>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over optimiser steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def _path(line: Line, x, y) -> str:  # type: ignore[no-untyped-def]
    """A line, and a dot with its value under the pointer at every point of a short one."""
    style = f"c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"
    shown = [(thinned(line.series), line.opacity, "")]
    if len(line.series) > SMOOTHED:
        shown = [(shown[0][0], 0.3 * line.opacity, " raw"), (thinned(smoothed(line.series)), line.opacity, "")]
    parts = []
    for series, opacity, kind in shown:
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in series)
        parts.append(f'<polyline class="{style}{kind}" opacity="{opacity:g}" points="{points}"/>')
    for step, value in line.series if len(line.series) <= 40 else ():
        hint = f"<title>{escape(line.name)}: {number(value)} at step {step}</title>"
        parts.append(
            f'<circle class="{style}" opacity="{line.opacity:g}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5">'
            f"{hint}</circle>"
        )
    return "".join(parts)


def _short(value: float) -> str:
    """A tick: 12000 as 12k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or abs(value) >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
