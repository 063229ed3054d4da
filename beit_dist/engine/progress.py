"""The progress of a run on a terminal or in a log: one line that stays up to date, and a history that thins out.

On a terminal the newest line replaces the one before and fits the width; at growing intervals one stays. In a log
only those that stay are written.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from beit_dist.engine.output import one_line
from beit_dist.step_numbers import Baselines, Number

_GROWTH = 1.25
"""A line stays when this many times as long has passed since the first as when the last one stayed ..."""
_LEAST, _MOST = {True: 5.0, False: 1.0}, 600.0
"""... but not sooner than the least number of seconds (on a terminal, in a log), nor later than the most ..."""
_PARTS = 20
"""... and when another such part of the run is done."""
_WAITS = 0.05
"""Share of the time spent waiting for data from which on it is worth a word."""


@dataclass(frozen=True)
class Pace:
    """How fast the steps of an interval were."""

    images_per_second: float
    data_wait: float
    """Share of the time in which the rank waited for data."""


@dataclass(frozen=True)
class Field:
    """A part of a line."""

    text: str
    importance: int
    """The least is what a narrow terminal shows first."""
    beside: str = ""
    """Shown behind the text where there is room; less important by ``later``."""
    later: int = 3


class ProgressLine:
    """Shows a run's steps and measurements. Rank 0's.

    Args:
        numbers: of a step, in the order in which they are shown.
        baselines: of these numbers; the strongest is shown.
        total_steps: where the run ends.
        enabled: false shows nothing.
        out: where to; the standard output by default.
    """

    def __init__(
        self,
        numbers: Sequence[Number],
        baselines: Baselines,
        total_steps: int,
        *,
        enabled: bool = True,
        out: TextIO | None = None,
    ) -> None:
        self._numbers = [number for number in numbers if number.text is not None]
        self._baselines, self._total, self._enabled = baselines, total_steps, enabled
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._kept: list[Mapping[str, Any]] = []  # lines since one stayed
        self._first: tuple[float, int] | None = None  # when the first step had been taken, and which
        self._next_at, self._part = 0.0, -1
        self._open = False  # a line stands that the next one replaces

    def steps(self, lines: Sequence[Mapping[str, Any]], pace: Pace) -> None:
        """Show steps that were taken: the means of their loss and its kind, the last value of all else.

        Args:
            lines: of ``metrics.jsonl``; at least one.
        """
        if not self._enabled:
            return
        self._kept += lines
        stays = self._is_to_stay(lines[-1]["step"])
        if not (stays or self._terminal):
            return
        shown = self._kept if stays else lines
        fields = [
            Field(f"step {lines[-1]['step']}/{self._total}", 0),
            Field(f"epoch {lines[-1]['epoch']:.2f}", 9),
            *self._fields(self._numbers, _means(self._numbers, shown), self._baselines),
            Field(f"lr {lines[-1]['lr']:.2e}", 10),
            Field(f"{pace.images_per_second:.0f} images/s", 8),
        ]
        if (left := self._left(lines[-1]["step"])) is not None:  # the first step waits for the loader to start
            if pace.data_wait >= _WAITS:
                fields.append(Field(f"data wait {pace.data_wait:.0%}", 7))
            fields.append(Field(f"{clock(left)} left", 3))
        self._say(fields, stays)
        if stays:
            self._kept = []

    def measured(self, step: int, numbers: Sequence[Number], values: Mapping[str, Any], known: Baselines) -> None:
        """Show what was measured on held-out images."""
        shown = [number for number in numbers if number.text is not None]
        self._say([Field(f"step {step}  held out", 0), *self._fields(shown, values, known)], stays=True)

    def close(self) -> None:
        """End the line."""
        if self._open:
            self._open = False
            with one_line:
                print(file=self._out, flush=True)

    def _is_to_stay(self, step: int) -> bool:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        part = step * _PARTS // max(1, self._total)
        if now < self._next_at and (part <= self._part or self._terminal):
            return False
        passed = now - self._first[0]
        self._next_at = now + min(_MOST, max(_LEAST[self._terminal], (_GROWTH - 1) * passed))
        self._part = part
        return True

    def _left(self, step: int) -> float | None:
        """Seconds, judged by all steps of this start but the first, saves and measurements included."""
        if self._first is None or step <= self._first[1]:
            return None
        return (time.monotonic() - self._first[0]) / (step - self._first[1]) * (self._total - step)

    def _fields(self, numbers: Sequence[Number], values: Mapping[str, Any], baselines: Baselines) -> list[Field]:
        fields = []
        for place, number in enumerate(numbers):
            strongest = number.strongest(baselines.get(number.name, ()))
            beside = f" ({strongest.name} {number.form(strongest.value)})" if strongest else ""
            fields.append(Field(said(number, values[number.name]), 1 if not place else 4 + place, beside))
        return fields

    def _say(self, fields: Sequence[Field], stays: bool) -> None:
        if not self._enabled:
            return
        text = fitted(fields, shutil.get_terminal_size().columns - 1 if self._terminal else None)
        with one_line:
            self._open = not stays
            start = "\r\033[K" if self._terminal else ""
            print(f"{start}{text}", end="\n" if stays else "", file=self._out, flush=True)


def fitted(fields: Sequence[Field], width: int | None) -> str:
    """The fields in their order; where ``width`` columns do not hold all, the least important are left out."""
    pieces = sorted(
        [(field.importance, place, False) for place, field in enumerate(fields)]
        + [(field.importance + field.later, place, True) for place, field in enumerate(fields) if field.beside]
    )
    taken: set[tuple[int, bool]] = set()

    def text() -> str:
        return "  ".join(
            field.text + (field.beside if (place, True) in taken else "")
            for place, field in enumerate(fields)
            if (place, False) in taken
        )

    for _, place, beside in pieces:
        if beside and (place, False) not in taken:
            continue
        taken.add((place, beside))
        if width is not None and len(text()) > width:
            taken.remove((place, beside))
    return text() or fields[0].text[: max(1, width or 1)]


def said(number: Number, value: Any) -> str:
    """A number as the line shows it."""
    if number.text is None:
        return ""
    return number.text.format(value) if value is not None else f"{number.name} not finite"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours and days where there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _means(numbers: Sequence[Number], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of numbers with a better way, such as the loss, the mean; else the last. None: one was not finite."""
    found = {}
    for number in numbers:
        values = [line[number.name] for line in lines]
        smooth = number.better is not None and None not in values
        found[number.name] = math.fsum(values) / len(values) if smooth else values[-1]
        if number.better is not None and None in values:
            found[number.name] = None
    return found
