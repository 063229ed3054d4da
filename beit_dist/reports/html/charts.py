"""Charts as paths and labels of an SVG, whose colours the page's style gives: so they suit dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

WIDTH, HEIGHT = 380, 230
"""Of a chart in units that are about pixels: as wide as a phone, where letters of 12 are readable."""
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34
_MOST_POINTS = 300
"""Of a line; more cannot be told apart."""
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Something to be drawn."""

    at: Values
    values: Values
    """NaN leaves a gap."""
    style: str
    """A class of the page's style: ``raw``, ``smooth``, ``held-out`` (dots) or ``measured`` (dots and a line)."""
    colour: int
    """Of which run."""


@dataclass(frozen=True)
class Level:
    """A line across: a baseline."""

    value: float
    label: str
    dashes: int
    """Number of its pattern of dashes."""


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A line as a path, or as dots."""

    path: str
    dots: tuple[tuple[float, float, str], ...]
    """Places, and what each says."""
    style: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    title: str
    summary: str
    """For those who do not see it."""
    help: str
    along: str
    """What is to the right."""
    lines: tuple[Drawn, ...]
    levels: tuple[tuple[float, Level], ...]
    """Height of each, and what it is."""
    marks: tuple[float, ...]
    """Places of upright lines: resumes."""
    across: tuple[Tick, ...]
    upwards: tuple[Tick, ...]
    notes: tuple[str, ...] = field(default=())


class _Scale:
    """From values to places."""

    def __init__(self, low: float, high: float, first: float, last: float, *, log: bool = False) -> None:
        self.log = log
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        self.first, self.last = first, last

    def __call__(self, values: Values) -> Values:
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.log10(values) if self.log else values
        share = (scaled - self.low) / (self.high - self.low)
        placed: Values = self.first + np.clip(share, -0.05, 1.05) * (self.last - self.first)
        return placed

    def ticks(self, count: int, *, whole: bool = False) -> Values:
        if self.log:
            found = np.asarray(LogLocator(numticks=count).tick_values(10**self.low, 10**self.high))
            low, high = 0.999 * 10**self.low, 1.001 * 10**self.high
        else:
            locator = MaxNLocator(nbins=count, integer=whole, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
            found = np.asarray(locator.tick_values(self.low, self.high))
            margin = 1e-9 * (self.high - self.low)
            low, high = self.low - margin, self.high + margin
        inside = (found >= low) & (found <= high)
        return np.asarray(found[inside], np.float64)


def draw(
    title: str,
    lines: Sequence[Line],
    *,
    along: str,
    summary: str,
    help: str = "",
    levels: Sequence[Level] = (),
    marks: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    percent: bool = False,
    log: bool = False,
    whole: bool = True,
    notes: Sequence[str] = (),
) -> Chart | None:
    """Lay a chart out; None where there is not one finite number.

    Args:
        title: what is drawn.
        lines: in any order.
        along: what is to the right.
        summary: for those who do not see it.
        help: a sentence on what it is.
        levels: drawn across.
        marks: drawn upright.
        span: what is to the right at least, for charts beside one another.
        percent: whether values are in percent, from 0.
        log: whether the scale upwards is logarithmic; then all values are above 0.
        whole: whether the scale to the right has whole numbers only.
        notes: what else there is to say.
    """
    at = np.concatenate([line.at[np.isfinite(line.values)] for line in lines] or [np.array([])])
    if not len(at):
        return None
    low, high = _range(lines, levels, percent=percent, log=log)
    ends = np.concatenate([at, np.array(span or (), np.float64)])
    first, last = float(ends.min()), float(ends.max())
    if first == last:
        first, last = first - 0.5, last + 0.5
    x = _Scale(first, last, LEFT, WIDTH - RIGHT)
    y = _Scale(low, high, HEIGHT - BOTTOM, TOP, log=log)
    unit = "%" if percent else ""
    return Chart(
        title=title,
        summary=summary,
        help=help,
        along=along,
        lines=tuple(_drawn(line, x, y, along, unit) for line in lines),
        levels=tuple((round(float(y(np.array([one.value]))[0]), 1), one) for one in levels),
        marks=tuple(round(float(place), 1) for place in x(np.array(marks, np.float64))),
        across=_labelled(x, x.ticks(5, whole=whole), ""),
        upwards=_labelled(y, y.ticks(5), unit),
        notes=tuple(notes),
    )


def _range(lines: Sequence[Line], levels: Sequence[Level], *, percent: bool, log: bool) -> tuple[float, float]:
    """Of what is to be read; single steps far outside are cut off."""
    seen = [np.array([level.value for level in levels])]
    for line in lines:
        known = line.values[np.isfinite(line.values)]
        if len(known):
            seen.append(np.percentile(known, (1, 99)) if line.style == "raw" else known)
    values = np.concatenate(seen)
    low, high = float(values.min()), float(values.max())
    if log:
        low = max(low, high * 1e-9, 1e-300)
        return low / 1.2, high * 1.2
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if percent else low - room), high + room


def _labelled(scale: _Scale, values: Values, unit: str) -> tuple[Tick, ...]:
    places = scale(values)
    return tuple(
        Tick(round(float(place), 1), short(float(value)) + unit)
        for place, value in zip(places, values, strict=True)
    )


def short(value: float) -> str:
    """A number on an axis: ``12,000``, ``0.25``, ``4e-5``."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _drawn(line: Line, x: _Scale, y: _Scale, along: str, unit: str) -> Drawn:
    at, values = thinned(line.at, line.values, line.style)
    places = np.stack([x(at), y(values)], 1)
    known = np.asarray(np.isfinite(places).all(1))
    dots: list[tuple[float, float, str]] = []
    if line.style in ("held-out", "measured") or known.sum() < 2:
        dots = [
            (round(float(a), 1), round(float(b), 1), f"{along} {where:,.0f}: {value:.4g}{unit}")
            for (a, b), where, value in zip(places[known], at[known], values[known], strict=True)
        ]
    pieces, begun = [], False
    if line.style != "held-out":
        for (a, b), there in zip(places, known, strict=True):
            if there:
                pieces.append(f"{'L' if begun else 'M'}{a:.1f} {b:.1f}")
            begun = bool(there)
    return Drawn("".join(pieces), tuple(dots), line.style, line.colour)


def thinned(at: Values, values: Values, style: str) -> tuple[Values, Values]:
    """No more points than can be told apart: of ``raw`` lines the least and the greatest of each group, of others
    every so manieth, and the last."""
    if len(at) <= _MOST_POINTS:
        return at, values
    if style != "raw":
        chosen = np.unique(np.append(np.linspace(0, len(at) - 1, _MOST_POINTS).round().astype(int), len(at) - 1))
        return at[chosen], values[chosen]
    chosen_rows: list[int] = []
    for rows in np.array_split(np.arange(len(at)), _MOST_POINTS // 2):
        known = rows[np.isfinite(values[rows])]
        if len(known):
            ends = {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            chosen_rows += sorted(ends)
    picked = np.array(chosen_rows, np.int64)
    return at[picked], values[picked]
