"""What frozen features are worth, layer by layer: by ``beit probe --json``, or as measured in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beit_dist.reports.html.charts import Chart, Level, Line, draw
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject

PLACES = ("probe.json", "probe/probe.json")
"""Where the JSON of ``beit probe`` is looked for, in a run's folder."""
_HOW = "Run: beit probe RUN --data labelled/train --test labelled/val --json RUN/probe.json"
_WHAT = (("linear", "Linear classifier"), ("knn", "20 nearest neighbours"))


@dataclass(frozen=True)
class Probes:
    """Of one run: percent of test images that are right, by layer."""

    source: str
    layers: tuple[int, ...]
    scores: Mapping[str, tuple[float, ...]]
    """By ``linear`` and ``knn``."""
    commonest: float | None
    """Percent that is right if the answer is always the commonest class."""

    def best(self, name: str) -> tuple[float, int]:
        """The best score, and its layer."""
        values = self.scores[name]
        place = int(np.argmax(values))
        return values[place], self.layers[place]


def probes_of(run: Subject) -> Probes | Missing:
    """The newest probe that is beside the run.

    Raises:
        OSError, KeyError, TypeError, ValueError: a file is damaged.
    """
    for name in PLACES:
        if run.place.exists(name):
            told = json.loads(run.place.read(name))
            return _of(told["layers"], f"{name}: {told['model']}", told.get("commonest_class"))
    measured = run.history.held_out.lines if run.history else []
    for line in reversed(measured):
        if line.get("probe_layers"):
            commonest = next((one.value for one in run.baselines.held_out.get("probe_linear", ())), None)
            return _of(line["probe_layers"], f"measured in training, at step {line['step']:,}", commonest)
    return Missing(f"No probe is beside the run. {_HOW}")


def _of(layers: Sequence[Mapping[str, Any]], source: str, commonest: float | None) -> Probes:
    scores = {name: tuple(100 * float(each[name]["test"]) for each in layers) for name, _ in _WHAT}
    numbers = tuple(int(each["layer"]) for each in layers)
    return Probes(source, numbers, scores, None if commonest is None else 100 * float(commonest))


def probe_charts(found: Sequence[tuple[Subject, Probes]]) -> list[Chart]:
    """A chart for each kind of probe, of all runs."""
    charts = []
    for name, title in _WHAT:
        lines = [
            Line(np.array(one.layers, np.float64), np.array(one.scores[name]), "measured", run.number)
            for run, one in found
        ]
        levels = {one.commonest for _, one in found if one.commonest is not None}
        said = [f"{run.name}: best {one.best(name)[0]:.1f}% with layer {one.best(name)[1]}." for run, one in found]
        chart = draw(
            title,
            lines,
            along="layer",
            summary=f"{title}, test accuracy by layer. " + " ".join(said),
            help="Share of test images that are right, from frozen features of each layer.",
            levels=[
                Level(value, f"commonest class {value:.1f}%", place) for place, value in enumerate(sorted(levels))
            ],
            percent=True,
        )
        if chart is not None:
            charts.append(chart)
    return charts
