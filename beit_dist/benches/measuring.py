"""Repetitions, medians and ranges."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass
class Row:
    """One contender in one case: the median and the range of its repetitions."""

    bench: str
    case: str
    who: str
    value: float
    unit: str
    low: float
    high: float


def row(bench: str, case: str, who: str, values: list[float], unit: str) -> Row:
    """A row from the repetitions' values."""
    return Row(bench, case, who, statistics.median(values), unit, min(values), max(values))


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by ``clock``: wall-clock ones by default."""
    began = clock()
    work()
    return clock() - began


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender, run in turn after one warm-up, so that drifts of the machine hit all alike.

    ``clock=time.process_time`` counts the processor's time, for work that waits for nothing else.
    """
    for work in contenders.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, work in contenders.items():
            taken[name].append(seconds(work, clock))
    return taken
