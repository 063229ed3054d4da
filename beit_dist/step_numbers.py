"""What a training says of each of its steps: every number is declared once, here is how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple


class Baseline(NamedTuple):
    """What a number comes to without any learning from images: a yardstick, shown beside it."""

    name: str
    """``uniform`` (all answers alike), ``frequency`` (knows how often each token occurs) or ``commonest token``
    (always answers it); of pixels ``palette`` and ``mean colour``
    (one colour for each patch)."""
    value: float
    """In the number's unit."""


_PLACE = re.compile(r"\{[^}]*\}")

Baselines = Mapping[str, Sequence[Baseline]]
"""By the names of numbers; where nothing is known of one, it is not there."""


_Plain = dict[str, dict[str, dict[str, float]]]


class KnownBaselines(NamedTuple):
    """The baselines of a training."""

    training: Baselines = MappingProxyType({})
    """Of the numbers of a step, on the training data."""
    held_out: Baselines = MappingProxyType({})
    """Of what is measured, on held-out data."""
    unknown: str = ""
    """What is not known of them, and how to find it out."""

    def plain(self) -> _Plain:
        """For JSON: values by data, number and baseline."""
        return {
            data: {name: {one.name: one.value for one in known} for name, known in numbers.items()}
            for data, numbers in (("training", self.training), ("held_out", self.held_out))
        }

    @classmethod
    def of_plain(cls, plain: _Plain) -> KnownBaselines:
        """The reverse of :meth:`plain`."""
        training, held_out = (
            {name: [Baseline(*one) for one in known.items()] for name, known in plain.get(data, {}).items()}
            for data in ("training", "held_out")
        )
        return cls(training, held_out)


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a step, and everything that anyone needs to show it.

    Where a model or a task sums numbers on the device, the loop divides each sum by the step's weight (masked
    patches, images, ...) over the global batch. Then it is in ``metrics.jsonl``, in the metrics, in TensorBoard
    and Weights & Biases, in the progress line and in the tables of the documentation.
    """

    name: str
    """Its key in ``metrics.jsonl`` and ``validation.jsonl``, and its name in TensorBoard."""
    help: str
    """One sentence for a person: what it is, in which unit."""
    metric: str | None = None
    """Its name in Prometheus in training, unit included; None exports nothing."""
    held_out: str | None = None
    """The same for what is measured on held-out data; None where it is not measured there."""
    text: str | None = None
    """How the progress line shows it, with a place for the value: ``"accuracy {:.1%}"``. None: not."""
    kind: Literal["gauge", "counter"] = "gauge"
    """A counter's metric is the sum over all steps of the run."""
    better: Literal["lower", "higher"] | None = None
    """Which way is better; for numbers that have baselines, or of which the best is told."""

    def form(self, value: float) -> str:
        """A value in the way ``text`` has it, without the words: ``"4.1102"``, ``"5.6%"``."""
        place = _PLACE.search(self.text or "")
        return (place[0] if place else "{:.4g}").format(value)

    def is_better(self, value: float, other: float) -> bool:
        """Whether ``value`` is better than ``other``."""
        return value > other if self.better == "higher" else value < other

    def strongest(self, baselines: Sequence[Baseline]) -> Baseline | None:
        """The baseline that is hardest to beat."""
        return next(iter(sorted(baselines, key=lambda one: one.value, reverse=self.better == "higher")), None)

    def beyond(self, value: float, baseline: Baseline) -> str:
        """How far a value has come beyond a baseline, in words."""
        named = f"{baseline.name} ({self.form(baseline.value)})"
        if not self.is_better(value, baseline.value):
            return f"not beyond {named}"
        if self.better == "higher" and baseline.value > 0 and "%" in (self.text or ""):
            return f"{value / baseline.value:.1f} times {named}"
        return f"{abs(value - baseline.value):.2f} {'above' if value > baseline.value else 'below'} {named}"
