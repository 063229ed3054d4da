"""The curves of all runs, each number on one pair of axes, beside its baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

import numpy as np
from numpy.typing import NDArray

from beit_dist.reports.curves import OF_EVERY_RUN
from beit_dist.reports.history import History, smoothed
from beit_dist.reports.html.charts import Chart, Level, Line, draw
from beit_dist.reports.html.subject import Subject
from beit_dist.step_numbers import Baseline, Number

_SMOOTHED_FROM = 50
"""Steps from which on a curve is a moving average over 4 % of the run."""
_FAR = 20.0
"""A largest norm so many times the median is drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Named:
    """A number, in the words of a title."""

    number: Number

    @property
    def _parts(self) -> tuple[str, str, str]:
        (before, _, form, _), *rest = Formatter().parse(self.number.text or f"{self.number.name} {{}}")
        return before.strip(), form or "", "".join(literal for literal, *_ in rest).strip()

    @property
    def title(self) -> str:
        """``"PSNR {:.2f} dB"`` is ``PSNR (dB)``."""
        before, _, unit = self._parts
        label = f"{before} ({unit})" if unit else before
        return label if label[1:2].isupper() else label[0].upper() + label[1:]

    @property
    def percent(self) -> bool:
        """Whether it is a share, shown in percent."""
        return self._parts[1].endswith("%")

    def form(self, value: float) -> str:
        """As the progress line shows it, without its unit."""
        return self.number.form(int(value) if value == int(value) else value)

    def value(self, value: float) -> str:
        """With its unit."""
        return f"{self.form(value)} {self._parts[2]}".strip()


def charts_of(runs: Sequence[Subject]) -> list[Chart]:
    """A chart for each number of the runs that any of them has: steps, or samples where batches differ."""
    drawn = [run for run in runs if run.history is not None and run.kind is not None and run.config is not None]
    charts = [_chart(title, having, alone=len(runs) == 1) for title, having in _numbers(drawn).items()]
    return [chart for chart in charts if chart is not None]


def _numbers(runs: Sequence[Subject]) -> dict[str, list[tuple[Subject, Number]]]:
    """By title, the runs that have the number; those of every run last. Kinds share these alone: an accuracy of
    tokens and one of classes are not to be compared."""
    found: dict[tuple[str, str], list[tuple[Subject, Number]]] = {}
    for run in runs:
        for number in shown(run):
            kind = "" if number in OF_EVERY_RUN else run.state.kind
            having = found.setdefault((Named(number).title, kind), [])
            if all(other is not run for other, _ in having):
                having.append((run, number))
    titles = Counter(title for title, _ in found)
    ordered = sorted(found.items(), key=lambda item: not item[0][1])
    return {title if titles[title] == 1 else f"{title} of the {kind}": having for (title, kind), having in ordered}


def shown(run: Subject) -> list[Number]:
    """The numbers of a run that are drawn: its steps', what is measured on held-out data, those of every run."""
    if run.kind is None or run.config is None:
        return []
    own, measured = run.kind.numbers(run.config), run.kind.measured(run.config)
    numbers = {number.name: number for number in own[:1]}
    for number in (*measured, *own[1:]):
        if number.text is not None:
            numbers.setdefault(number.name, number)
    return [*numbers.values(), *OF_EVERY_RUN]


def _chart(title: str, having: Sequence[tuple[Subject, Number]], *, alone: bool) -> Chart | None:
    number = having[0][1]
    unit = "step" if _same_batch([run for run, _ in having]) else "samples"
    ends = [end for run, _ in having if run.history for end in run.history.trained.values(unit)[[0, -1]]]
    named = Named(number)
    scale = 100.0 if named.percent else 1.0
    lines, said, notes = [], [], []
    for run, _ in having:
        assert run.history is not None
        lines += list(_lines(run, run.history, number.name, unit, scale, alone=alone))
        said.append(_summary(run, run.history, named, unit))
        if lost := int(run.history.trained.not_finite(number.name).sum()):
            notes.append(f"{run.name}: not finite at {lost:,} step{'s' if lost > 1 else ''}")
    levels = [
        Level(scale * one.value, f"{one.name} {named.value(one.value)}", place % 4)
        for place, one in enumerate(_baselines(having, number))
    ]
    values = np.concatenate([line.values for line in lines] or [np.array([])])
    history = having[0][0].history
    return draw(
        title,
        lines,
        along="optimizer step" if unit == "step" else "samples trained on",
        summary=f"{title}. " + " ".join(said),
        help=number.help,
        levels=levels,
        marks=_resumes(history, unit) if alone and history is not None else (),
        span=(min(ends), max(ends)),
        percent=named.percent,
        log=number.name == "grad_norm" and _spread_far(values),
        notes=notes,
    )


def _lines(run: Subject, history: History, name: str, unit: str, scale: float, *, alone: bool) -> Iterator[Line]:
    at, values = history.trained.values(unit), scale * history.trained.values(name)
    smooth = len(values) >= _SMOOTHED_FROM and name != "lr"
    if np.isfinite(values).any():
        if alone and smooth:
            yield Line(at, values, "raw", run.number)
        yield Line(at, smoothed(values) if smooth else values, "smooth", run.number)
    at, values = history.held_out.values(unit), scale * history.held_out.values(name)
    known = np.isfinite(values)
    if known.any():
        yield Line(at[known], values[known], "measured" if alone else "held-out", run.number)


def _summary(run: Subject, history: History, named: Named, unit: str) -> str:
    name = named.number.name
    parts = []
    for what, series in (("in training", history.trained), ("held out", history.held_out)):
        at, values = series.values(unit), series.values(name)
        known = np.flatnonzero(np.isfinite(values))
        if len(known):
            first, last = known[0], known[-1]
            parts.append(
                f"{what} from {named.value(values[first])} at {unit} {at[first]:,.0f} to "
                f"{named.value(values[last])} at {at[last]:,.0f}"
            )
    return f"{run.name}: {'; '.join(parts) or 'no numbers'}."


def _baselines(having: Sequence[tuple[Subject, Number]], number: Number) -> list[Baseline]:
    """Those of held-out data, or else of training, which all runs share."""
    of_runs = []
    for run, _ in having:
        known = run.baselines
        of_runs.append(list(known.held_out.get(number.name) or known.training.get(number.name, ())))
    first, *others = of_runs
    values = [{one.name: one.value for one in other} for other in others]
    return [one for one in first if all(np.isclose(other.get(one.name, np.nan), one.value) for other in values)]


def _resumes(history: History, unit: str) -> list[float]:
    steps, at = history.trained.steps, history.trained.values(unit)
    return [float(at[steps == step][0]) for step in history.resumed]


def _same_batch(runs: Sequence[Subject]) -> bool:
    """Whether a step of each run takes as many samples, so that steps can be compared."""
    ends = [run.history.trained.lines[-1] for run in runs if run.history is not None]
    return len({end["samples"] / end["step"] if "samples" in end and end["step"] else 0 for end in ends}) <= 1


def _spread_far(values: NDArray[np.float64]) -> bool:
    known = values[np.isfinite(values)]
    return len(known) > 0 and known.min() > 0 and known.max() > _FAR * np.median(known)
