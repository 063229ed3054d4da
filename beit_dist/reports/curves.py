"""The curves of one run, or of several over each other, each number beside its baselines.

Nothing here knows a kind of training: what is drawn, and what it is called, its numbers declare.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from beit_dist.lettering import shortened
from beit_dist.reports.curve_lines import (
    HELD_OUT,
    MARK,
    draw_alone,
    draw_among,
    draw_baselines,
    mark_resumes,
    style_of,
)
from beit_dist.reports.history import History
from beit_dist.reports.names import save, verbatim
from beit_dist.step_numbers import Baseline, KnownBaselines, Number

OF_EVERY_RUN = (
    Number(name="lr", help="", text="learning rate {:.2e}"),
    Number(name="grad_norm", help="The norm of the gradient before clipping.", text="gradient norm {:.3f}"),
)
"""What the trainer notes of each step, whatever is trained."""

_FAR = 20.0
"""A largest norm so many times the median is drawn on a logarithmic scale."""
_WIDTH, _LINE, _HEADING, _ENTRIES = 6.2, 76, 52, 60
"""Inches: drawn narrow, so that a phone shows it readably; characters of a small line, of the title,
and of a line of the legend."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run."""

    name: str
    history: History
    numbers: Sequence[Number]
    """What its steps say; the first is the loss."""
    measured: Sequence[Number] = ()
    """What is measured on held-out data."""
    baselines: KnownBaselines = KnownBaselines()  # noqa: RUF009 (a tuple)


@dataclass(frozen=True)
class _Panel:
    """One number of all runs."""

    name: str
    label: str
    percent: bool
    help: str

    @classmethod
    def of(cls, number: Number) -> _Panel:
        """As the progress line calls it: ``"PSNR {:.2f} dB"`` is ``PSNR (dB)``."""
        (before, _, form, _), *rest = Formatter().parse(number.text or f"{number.name} {{}}")
        unit = "".join(literal for literal, *_ in rest).strip()
        label = f"{before.strip()} ({unit})" if unit else before.strip()
        return cls(number.name, label, (form or "").endswith("%"), number.help)

    @property
    def scale(self) -> int:
        return 100 if self.percent else 1

    def legend_of(self, baseline: Baseline) -> str:
        value = f"{100 * baseline.value:.1f} %" if self.percent else f"{baseline.value:.2f}"
        return f"{baseline.name}: {value}"

    def of_both(self, known: KnownBaselines) -> list[Baseline]:
        """In training, and on held-out data where that is another."""
        training, held_out = (list(each.get(self.name, ())) for each in (known.training, known.held_out))
        shown = {self.legend_of(baseline) for baseline in training}
        others = [baseline for baseline in held_out if self.legend_of(baseline) not in shown]
        return training + [Baseline(f"{baseline.name}, held out", baseline.value) for baseline in others]


def panels_of(run: Curves) -> list[Number]:
    """The numbers drawn: the loss, what is measured on held-out data and shown, and those of every run."""
    loss = run.numbers[0]
    measured = [number for number in run.measured if number.text is not None and number.name != loss.name]
    return [loss, *measured, *OF_EVERY_RUN]


def draw_curves(runs: Sequence[Curves], out: str | Path, title: str = "") -> None:
    """Write a PNG with a panel for each number, over the steps.

    One run is drawn with every step, its moving average, what was measured on held-out data and the resumes.
    Of several each has a colour: a line for its moving average, dots for held-out data. Where their batches
    differ, samples are to the right in place of steps.

    Args:
        runs: at least one; the first says which numbers are drawn.
        out: the PNG file.
        title: above the picture of one run; several have a legend there.
    """
    panels = [_Panel.of(number) for number in panels_of(runs[0])]
    heights = [2.7, *(1.9 for _ in panels[1:-2]), 1.2, 1.2]
    named = 0.2 * len(runs) + 0.2 if len(runs) > 1 else 0.0
    size = (_WIDTH, sum(heights) + 0.5 * len(panels) + 0.6 + named)
    figure = Figure(figsize=size, dpi=180, layout="constrained")
    drawn = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    unit = "step" if _same_batch(runs) else "samples"
    said: set[str] = set()
    for axes, panel in zip(drawn, panels, strict=True):
        _draw_panel(axes, panel, runs, unit, said)
    drawn[-1].set_xlabel("optimizer step" if unit == "step" else "samples trained on")
    drawn[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    figure.align_ylabels()
    if len(runs) > 1:
        _name_runs(figure, runs)
    else:
        lines = textwrap.wrap(shortened(title, 2 * _HEADING), _HEADING)
        verbatim(figure.suptitle("\n".join(lines), fontsize=12))
    save(figure, out)


def _draw_panel(axes: Axes, panel: _Panel, runs: Sequence[Curves], unit: str, said: set[str]) -> None:
    """A number of all runs; ``said`` is what the legends above explain already."""
    for place, run in enumerate(runs):
        if len(runs) == 1:
            draw_alone(axes, run.history, panel.name, unit, panel.scale, smooth=panel.name != "lr")
            mark_resumes(axes, run.history.resumed)
        else:
            draw_among(axes, run.history, panel.name, unit, panel.scale, place)
    baselines = _common([panel.of_both(run.baselines) for run in runs])
    named = [(panel.legend_of(baseline), panel.scale * baseline.value) for baseline in baselines]
    draw_baselines(axes, named, held_out=HELD_OUT if len(runs) == 1 else MARK)
    axes.set_ylabel(panel.label)
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    if panel.name == "grad_norm" and _spread_far([run.history.trained.values(panel.name) for run in runs]):
        axes.set_yscale("log")
    axes.margins(y=0.08)
    if panel.percent:
        axes.set_ylim(bottom=0)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    unknown = {run.baselines.unknown for run in runs if panel.name == run.numbers[0].name} - {""}
    _explain(axes, [panel.help, *(f"Baselines: {shortened(what, 2 * _LINE)}" for what in sorted(unknown))], said)


def _explain(axes: Axes, texts: Sequence[str], said: set[str]) -> None:
    """What the number is, and what its lines are, above the panel: there nothing is covered."""
    handles, labels = axes.get_legend_handles_labels()
    new = {label: handle for handle, label in zip(handles, labels, strict=True) if label not in said}
    said.update(new)
    legend = axes.legend(
        new.values(),
        new.keys(),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0.1,
        ncols=min(len(new), 3 if 3 * max(map(len, new)) <= _ENTRIES else 2) if new else 1,
        frameon=False,
        fontsize=9,
        handlelength=2.2,
        columnspacing=1.2,
        title="\n".join(line for text in texts for line in textwrap.wrap(text, _LINE)),
        title_fontsize=8,
        alignment="left",
    )
    legend.get_title().set_color("0.35")
    for text in (*legend.get_texts(), legend.get_title()):
        verbatim(text)


def _name_runs(figure: Figure, runs: Sequence[Curves]) -> None:
    legend = figure.legend(
        [Line2D([], [], linewidth=2.5, **style_of(place)) for place in range(len(runs))],
        [shortened(run.name, 60) for run in runs],
        loc="outside upper left",
        frameon=False,
        fontsize=9,
        title="line: training, moving average; dots: held out",
        title_fontsize=8,
        alignment="left",
    )
    for text in legend.get_texts():
        verbatim(text)


def _common(of_runs: Sequence[Sequence[Baseline]]) -> list[Baseline]:
    """The baselines that are the same for all runs."""
    first, *others = of_runs
    values = [{baseline.name: baseline.value for baseline in other} for other in others]
    return [one for one in first if all(np.isclose(other.get(one.name, np.nan), one.value) for other in values)]


def _same_batch(runs: Sequence[Curves]) -> bool:
    """Whether a step of each run takes as many samples, so that steps can be compared."""
    ends = [run.history.trained.lines[-1] for run in runs]
    return len({end["samples"] / end["step"] if "samples" in end else 0 for end in ends}) == 1


def _spread_far(values: Sequence[NDArray[np.float64]]) -> bool:
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    return len(known) > 0 and known.min() > 0 and known.max() > _FAR * np.median(known)
