"""Means over seeds, and differences between trials that have all but the first weights in common."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

Found = Mapping[str, Mapping[str, Any]]

BLIND = 0.1
"""Accuracy of always answering the same of ten classes."""
COLOURS = {"tokens-blocks": "#0072b2", "scratch": "#d55e00", "scratch-4x": "#e69f00"}
NAMES = {
    "tokens-blocks": "pre-trained",
    "scratch": "from random weights",
    "scratch-4x": "from random weights, four times the epochs",
    "pixels-blocks": "pixels, blocks",
    "tokens-random": "tokens, single patches",
    "absolute": "absolute positions",
}


class Spread(NamedTuple):
    """Some trials that differ by their seeds only, or differences between such."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __format__(self, sign: str) -> str:
        """In per cent; as a difference with ``+``."""
        if not self.values:
            return "not run"
        spread = f" ± {100 * self.deviation:.1f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:{sign}.1f}{spread} ({len(self.values)})"

    def __str__(self) -> str:
        return format(self)


def spread(found: Found, pattern: str, number: str) -> Spread:
    """A number of all trials whose whole name matches."""
    values = [each["numbers"].get(number) for name, each in found.items() if re.fullmatch(pattern, name)]
    return Spread(tuple(value for value in values if value is not None))


def gain(found: Found, arm: str, other: str, number: str = "accuracy") -> Spread:
    """How much more the trials of an arm came to than those of another with the same seeds.

    Args:
        arm: the names of its trials without the seeds: ``finetune/tokens-blocks/10``.
        other: the same. One without pre-training has no seed of it: each of its trials is compared with those of
            all pre-trainings.
    """
    values = []
    for name, each in found.items():
        before, _, seeds = name.rpartition("/")
        partner = found.get(f"{other}/{seeds}") or found.get(f"{other}/{seeds.rpartition('-')[2]}")
        if before == arm and partner is not None:
            values.append(each["numbers"][number] - partner["numbers"][number])
    return Spread(tuple(values))


def verdict(more: Spread, aim: float, comparisons: int) -> str:
    """What can be said of an aim.

    Args:
        more: the differences.
        aim: in points.
        comparisons: that there are once all trials are done.
    """
    points = [100 * value for value in more.values]
    extent = f"{format(more, '+')}, {min(points):+.1f} to {max(points):+.1f}"
    if len(points) < comparisons:
        return f"not decided yet: {extent}, of {comparisons} comparisons"
    if min(points) >= aim:
        return f"reached in every comparison: {extent}"
    return f"{'reached on average' if 100 * more.mean >= aim else 'not reached'}: {extent}"
