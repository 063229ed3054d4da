"""The loss and accuracy curve of a run, from its ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from beit_dist.errors import DataError

RAW, SMOOTH, MARK = "#9ab8d8", "#1f4e8c", "#b5502f"
_SMOOTHED_FROM = 50
"""Steps from which on a curve is also drawn as a moving average over 4 % of the run."""
_NAMED_RESUMES = 4
"""More resumes than these get their lines without the word."""


@dataclass(frozen=True)
class History:
    """A run's numbers by step, in ascending order; NaN where a number was not finite or not recorded."""

    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    """Mean cross-entropy of the masked patches, in nats."""
    accuracy: NDArray[np.float64]
    """Share of the masked patches whose most likely token is right, 0 to 1."""
    resumed: tuple[int, ...]
    """First step of each attempt but the first."""


def read_history(path: str | Path) -> History:
    """Read ``metrics.jsonl``: one JSON object per step with ``step``, ``loss`` and ``accuracy``.

    A step that was trained twice counts as its last line says. A last line that is cut short, as a killed run
    leaves it, is left out.

    Raises:
        DataError: the file is missing, without a step, or holds something else.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Name a run folder in which training has begun."
        ) from None
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: got {line[:60].decode(errors='replace')!r}, "
                "expected a JSON object with a step"
            ) from None
    if not rows:
        raise DataError(f"{path}: got no steps, expected at least one. Let the run reach logging.every_steps.")
    steps = sorted(rows)
    attempts = [rows[step].get("attempt") for step in steps]
    resumed = [step for step, old, new in zip(steps[1:], attempts, attempts[1:], strict=False) if old != new]
    return History(
        steps=np.array(steps, np.int64),
        loss=_numbers(rows[step].get("loss") for step in steps),
        accuracy=_numbers(rows[step].get("accuracy") for step in steps),
        resumed=tuple(resumed),
    )


def draw_curves(history: History, vocabulary: int, out: str | Path, title: str = "") -> None:
    """Write a PNG of loss and accuracy over steps, with the loss of guessing and the resumes marked.

    Args:
        history: what :func:`read_history` found.
        vocabulary: number of visual tokens; guessing among them costs ln(vocabulary).
        out: the PNG file.
        title: above the picture.
    """
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    guessing = math.log(vocabulary)

    _curve(upper, history.steps, history.loss)
    upper.axhline(guessing, color="black", linewidth=0.8, linestyle="--")
    upper.annotate(
        f"guessing: ln {vocabulary} = {guessing:.2f}",
        (1, guessing),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
    )
    upper.set_title(title or "Pre-training")
    upper.set_ylabel("loss per masked patch (nats)")
    upper.margins(y=0.08)
    if len(history.steps) >= _SMOOTHED_FROM:
        upper.legend(loc="lower left", frameon=False, fontsize=9)

    _curve(lower, history.steps, 100 * history.accuracy)
    lower.set_ylabel("masked tokens\npredicted right (%)")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for step in history.resumed:
            axes.axvline(step, color=MARK, linewidth=0.9, linestyle=":")
    _name_resumes(upper, history.resumed)
    figure.align_ylabels()

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred moving average over 4 % of the values; NaN counts as absent."""
    reach = max(1, len(values) // 50)
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    present = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.maximum(present, 1)
    return np.where(present > 0, mean, np.nan)


def _curve(axes: Axes, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    if len(steps) < _SMOOTHED_FROM:
        axes.plot(steps, values, color=SMOOTH, linewidth=1.4, marker="o", markersize=2.5)
        return
    axes.plot(steps, values, color=RAW, linewidth=0.7, label="every step")
    axes.plot(steps, smoothed(values), color=SMOOTH, linewidth=1.6, label="moving average")


def _name_resumes(axes: Axes, resumed: Sequence[int]) -> None:
    for step in resumed[:_NAMED_RESUMES] if len(resumed) <= _NAMED_RESUMES else ():
        axes.annotate(
            f"resumed at step {step}",
            (step, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=90,
            va="center",
            fontsize=8,
            color=MARK,
        )


def _numbers(values: Any) -> NDArray[np.float64]:
    """JSON numbers to float64; null becomes NaN."""
    return np.array([math.nan if value is None else value for value in values], np.float64)
