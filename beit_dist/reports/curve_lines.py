"""The lines in a panel of curves: a number of one run or of several, what was not finite, resumes, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from beit_dist.reports.history import History, Series, smoothed

RAW, SMOOTH, HELD_OUT, MARK = "#a9cbe6", "#0072b2", "#d55e00", "0.45"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that people tell apart whatever their sight (Okabe and Ito, 2008)."""
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)))
"""Of runs, each time the colours have been used up."""
_BASELINES = ((0, (1, 1.5)), (0, (5, 2)), (0, (5, 1.5, 1, 1.5)))

_SMOOTHED_FROM = 50
"""Steps from which on a curve is also drawn as a moving average over 4 % of the run."""
_NAMED_RESUMES = 3
"""More resumes than these are counted, and not named by their steps."""


def style_of(place: int) -> dict[str, Any]:
    """Colour and dashes of one of several runs."""
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": _DASHES[place // len(PALETTE) % len(_DASHES)]}


def draw_alone(axes: Axes, history: History, name: str, unit: str, scale: float, smooth: bool) -> None:
    """A run's number at each step, its moving average, and as measured on held-out data.

    Args:
        unit: what is to the right: ``step`` or ``samples``.
        scale: of the number; 100 for a share.
        smooth: whether an average is of use.
    """
    at, values = history.trained.values(unit), scale * history.trained.values(name)
    smooth = smooth and len(values) >= _SMOOTHED_FROM
    if np.isfinite(values).any():
        if smooth:
            axes.plot(at, values, color=RAW, linewidth=0.7, label="each step")
            axes.plot(at, smoothed(values), color=SMOOTH, linewidth=1.5, label="moving average")
        else:
            axes.plot(at, values, color=SMOOTH, linewidth=1.5, label="each step", **_markers(values))
    _mark_not_finite(axes, history.trained, name, unit, SMOOTH)
    at, values = _measured(history, name, unit, scale)
    if len(values):
        axes.plot(at, values, color=HELD_OUT, linewidth=1.2, marker="D", markersize=4, label="held out")


def draw_among(axes: Axes, history: History, name: str, unit: str, scale: float, place: int) -> None:
    """The same of one of several runs: a line for its moving average, dots for held-out data."""
    style, values = style_of(place), scale * history.trained.values(name)
    line = smoothed(values) if len(values) >= _SMOOTHED_FROM and name != "lr" else values
    axes.plot(history.trained.values(unit), line, linewidth=1.5, **style, **_markers(values))
    _mark_not_finite(axes, history.trained, name, unit, style["color"])
    at, values = _measured(history, name, unit, scale)
    dots: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 5, "markeredgecolor": "white"}
    axes.plot(at, values, color=style["color"], **dots)


def _measured(
    history: History, name: str, unit: str, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where a number was measured on held-out data, and what it was: not all are measured at the same steps."""
    at, values = history.held_out.values(unit), scale * history.held_out.values(name)
    known = np.isfinite(values)
    return at[known], values[known]


def mark_resumes(axes: Axes, resumed: Sequence[int]) -> None:
    """A line for each step at which the run was continued."""
    listed = ", ".join(f"{step:,}" for step in resumed)
    label = f"resumed at step {listed}" if len(resumed) <= _NAMED_RESUMES else f"resumed {len(resumed)} times"
    for step in resumed:
        axes.axvline(step, color=MARK, linewidth=0.9, linestyle=(0, (2, 2)), label=label)


def draw_baselines(axes: Axes, baselines: Sequence[tuple[str, float]], held_out: str = HELD_OUT) -> None:
    """A line across for each, by the name that it has in the legend; ``held_out`` is the colour of those."""
    for number, (label, value) in enumerate(baselines):
        colour = held_out if "held out" in label else "black"
        axes.axhline(value, color=colour, linewidth=1, linestyle=_BASELINES[number % len(_BASELINES)], label=label)


def _markers(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A few steps are marked; one is not seen otherwise."""
    return {"marker": "o", "markersize": 3} if len(values) < _SMOOTHED_FROM else {}


def _mark_not_finite(axes: Axes, trained: Series, name: str, unit: str, color: str) -> None:
    """A cross at the lower edge for each step whose number was not finite."""
    lost = trained.not_finite(name)
    count = int(lost.sum())
    if count:
        crosses: dict[str, Any] = {"linestyle": "none", "marker": "x", "clip_on": False}
        label = f"not finite: {count:,} step{'s' if count > 1 else ''}"
        crosses["transform"] = axes.get_xaxis_transform()
        axes.plot(trained.values(unit)[lost], np.zeros(count), color=color, label=label, **crosses)
