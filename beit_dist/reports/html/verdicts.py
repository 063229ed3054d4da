"""What each run came to: how far beyond its baselines, in one word, a sentence, and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from beit_dist.errors import UserError
from beit_dist.models.verdict import Drawn, SingleColours, TokenUse, judge
from beit_dist.reports.history import Series
from beit_dist.reports.html.curves import Named
from beit_dist.reports.html.subject import Subject
from beit_dist.step_numbers import Baseline, Number

Tone = Literal["good", "middling", "bad", "open"]
_MOST_TELLING = ("mean_iou", "accuracy", "psnr", "loss")
"""Of the judged numbers, the one that the sentence is about."""
_LAST_SHARE = 20
"""In training the mean of one in so many steps is told, of the last ones."""
_LITTLE = 0.005
"""Share of a number by which another is about as good."""
_HOW_TO_MEASURE = {
    "pretraining": "Make the shards with --held-out, or set validation.data.",
    "classification": "Set validation.data (--test).",
    "segmentation": "Set validation.data (--test).",
}


@dataclass(frozen=True)
class Figure:
    """A number of a run beside its baselines."""

    name: str
    label: str
    help: str
    value: float
    text: str
    beyond: str
    """How far it is beyond the strongest baseline, in words; empty where none is known."""
    is_beyond: bool | None
    baselines: tuple[tuple[str, str], ...]
    """Names and values, in words."""
    best: str
    """The best that was measured, where the last is worse."""
    better: str | None
    """``higher`` or ``lower``."""
    bar: tuple[float, tuple[float, ...]] | None
    """Of a share that is better high: its length, and the places of baselines, between 0 and 1 of a bar."""


@dataclass(frozen=True)
class Verdict:
    """Of one run."""

    run: Subject
    word: str
    tone: Tone
    sentence: str
    advice: str
    """What to do; empty where nothing needs to be done."""
    figures: tuple[Figure, ...]
    of: str
    """What the figures were measured on, and when."""


def verdict_of(run: Subject) -> Verdict:
    """Judge a run by what was last measured on held-out data, or else say what is known."""
    numbers = list(run.kind.measured(run.config)) if run.kind and run.config else []
    held_out = run.history.held_out if run.history else Series([])
    if held_out.lines and numbers:
        figures = _figures(numbers, held_out, run.baselines.held_out)
        of = f"on held-out data, after step {held_out.lines[-1]['step']:,}"
        if run.state.kind == "tokenizer":
            return _of_tokenizer(run, held_out, figures, of)
        return _judged(run, figures, of)
    return _unmeasured(run)


def _judged(run: Subject, figures: tuple[Figure, ...], of: str) -> Verdict:
    judged = [figure for figure in figures if figure.is_beyond is not None]
    if not judged:
        why = "No baselines are known, so it is not known how much of this was learnt."
        advice = run.baselines.unknown or "Look at the curves."
        return Verdict(run, "not judged", "open", why, advice, figures, of)
    beyond = [figure for figure in judged if figure.is_beyond]
    telling = min(
        judged, key=lambda one: _MOST_TELLING.index(one.name) if one.name in _MOST_TELLING else len(_MOST_TELLING)
    )
    sentence = f"{telling.label} {telling.text}: {telling.beyond}."
    if len(beyond) == len(judged):
        return Verdict(run, "beyond its baselines", "good", sentence, "", figures, of)
    short = ", ".join(figure.label for figure in judged if not figure.is_beyond)
    if beyond:
        advice = f"Not beyond the baselines: {short}."
        return Verdict(run, "beyond some baselines", "middling", sentence, advice, figures, of)
    advice = "It has not learnt more than frequencies so far."
    if run.state.state != "running":
        advice += " Train longer, or look at docs/is-my-run-normal.md."
    return Verdict(run, "not beyond its baselines", "bad", sentence, advice, figures, of)


def _of_tokenizer(run: Subject, measured: Series, figures: tuple[Figure, ...], of: str) -> Verdict:
    """As ``beit tokenizer`` judges: by its own words where it has ended, else by the last measurement."""
    told = run.marker.get("verdict")
    if isinstance(told, Mapping) and isinstance(told.get("word"), str):
        word, why, advice = (str(told.get(name, "")) for name in ("word", "why", "advice"))
    else:
        word, why, advice = _judge_tokens(measured.lines[-1], run.baselines.held_out.get("psnr", ()))
    tones: dict[str, Tone] = {"good": "good", "usable": "middling", "poor": "bad", "collapsed": "bad"}
    return Verdict(run, word, tones.get(word, "open"), why, advice, figures, of)


def _judge_tokens(last: Mapping[str, Any], colours: Sequence[Baseline]) -> tuple[str, str, str]:
    known = {one.name: one.value for one in colours}
    try:
        use = TokenUse(
            last["vocabulary"], last["used"], last["perplexity"], last["commonest_share"], last["vocabulary"]
        )
        drawn = None
        if {"palette", "mean colour"} <= known.keys():
            drawn = Drawn(last["psnr"], SingleColours(known["palette"], known["mean colour"]))
        return judge(use, drawn)
    except (KeyError, TypeError, UserError):
        return "not judged", "Its last measurement lacks the numbers of a verdict.", ""


def _unmeasured(run: Subject) -> Verdict:
    trained = run.history.trained if run.history else Series([])
    numbers = list(run.kind.numbers(run.config)) if run.kind and run.config else []
    if not trained.lines or not numbers:
        why = "No step can be read." if run.damage else "No step has been made yet."
        return Verdict(run, "nothing to judge", "open", why, "", (), "")
    last = Series(trained.lines[-max(1, len(trained.lines) // _LAST_SHARE) :])
    means = {number.name: _mean(last, number.name) for number in numbers}
    figures = tuple(
        _figure(number, means[number.name], run.baselines.training.get(number.name, ()))
        for number in numbers
        if number.text is not None and math.isfinite(means[number.name])
    )
    of = f"in training, the mean of the last {len(last.lines):,} step{'s' if len(last.lines) > 1 else ''}"
    why = "Nothing was measured on held-out data, so it is not known what the model has learnt."
    return Verdict(run, "not measured", "open", why, _HOW_TO_MEASURE.get(run.state.kind, ""), figures, of)


def _mean(series: Series, name: str) -> float:
    values = series.values(name)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _figures(
    numbers: Sequence[Number], measured: Series, baselines: Mapping[str, Sequence[Baseline]]
) -> tuple[Figure, ...]:
    figures = []
    for number in numbers:
        values = measured.values(number.name)
        known = np.flatnonzero(np.isfinite(values))
        if number.text is None or not len(known):
            continue
        best = ""
        if number.better is not None:
            at = known[(np.argmax if number.better == "higher" else np.argmin)(values[known])]
            if abs(values[at] - values[known[-1]]) > _LITTLE * abs(values[known[-1]]):
                best = f"best {Named(number).value(values[at])} at step {measured.steps[at]:,}"
        figures.append(_figure(number, float(values[known[-1]]), baselines.get(number.name, ()), best))
    return tuple(figures)


def _figure(number: Number, value: float, baselines: Sequence[Baseline], best: str = "") -> Figure:
    named = Named(number)
    strongest = number.strongest(baselines) if number.better else None
    bar = None
    if named.percent and number.better == "higher":
        marks = [one.value for one in baselines]
        most = max(1e-9, *marks, value)
        scale = next((top for top in (0.05, 0.1, 0.25, 0.5) if most <= 0.9 * top), 1.0)
        bar = (min(1.0, value / scale), tuple(min(1.0, mark / scale) for mark in marks))
    return Figure(
        name=number.name,
        label=named.title,
        help=number.help,
        value=value,
        text=named.form(value),
        beyond=number.beyond(value, strongest) if strongest else "",
        is_beyond=number.is_better(value, strongest.value) if strongest else None,
        baselines=tuple((one.name, named.form(one.value)) for one in baselines),
        best=best,
        better=number.better,
        bar=bar,
    )


@dataclass(frozen=True)
class Comparison:
    """The verdicts of several runs as a table."""

    columns: tuple[str, ...]
    """Labels of numbers."""
    rows: tuple[tuple[Verdict, tuple[tuple[str, bool], ...]], ...]
    """Of each run: what stands in each column, and whether it is the best there."""


def compared(verdicts: Sequence[Verdict]) -> Comparison:
    """Put the figures of runs beside one another; only one that was measured on held-out data can be the best."""
    columns = list(dict.fromkeys(figure.label for verdict in verdicts for figure in verdict.figures))
    rows = []
    for verdict in verdicts:
        cells = []
        for label in columns:
            figure = _of(verdict, label)
            cells.append((figure.text, _is_best(figure, verdict, verdicts)) if figure else ("", False))
        rows.append((verdict, tuple(cells)))
    return Comparison(tuple(columns), tuple(rows))


def _is_best(figure: Figure, verdict: Verdict, verdicts: Sequence[Verdict]) -> bool:
    """Among runs of its kind on data with the same baselines: other numbers are not to be compared."""
    alike = [each for each in verdicts if each.run.state.kind == verdict.run.state.kind]
    found = [(each, one) for each in alike if (one := _of(each, figure.label))]
    comparable = all(
        each.of.startswith("on held-out") and one.baselines == figure.baselines for each, one in found
    )
    if figure.better is None or len(found) < 2 or not comparable:
        return False
    choose = max if figure.better == "higher" else min
    return figure.value == choose(one.value for _, one in found)


def _of(verdict: Verdict, label: str) -> Figure | None:
    return next((figure for figure in verdict.figures if figure.label == label), None)
