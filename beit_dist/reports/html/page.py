"""The page: everything that is found of the runs, in the order in which a reader asks, as one file of HTML."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import beit_dist
from beit_dist.errors import printable
from beit_dist.reports.drawing import Kind, Wishes
from beit_dist.reports.html.attention import Attention, attention_of
from beit_dist.reports.html.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart
from beit_dist.reports.html.curves import charts_of
from beit_dist.reports.html.data import Data, data_of
from beit_dist.reports.html.label_maps import Scenes, scenes_of
from beit_dist.reports.html.models import Models
from beit_dist.reports.html.predictions import Predictions, predictions_of
from beit_dist.reports.html.probes import Probes, probe_charts, probes_of
from beit_dist.reports.html.reconstructions import Reconstructions, reconstructions_of
from beit_dist.reports.html.section import Missing, Section, attempted, section_of
from beit_dist.reports.html.settings import Settings, settings_of
from beit_dist.reports.html.subject import Subject, open_subjects
from beit_dist.reports.html.timing import Timing, speed_chart, timing_of
from beit_dist.reports.html.tokenizer import Sheet, sheet_of
from beit_dist.reports.html.verdicts import Comparison, Verdict, compared, verdict_of
from beit_dist.storage.access import Access

PREDICTED = 500
"""Held-out images that a fine-tuned model predicts."""
_ATTENTION, _SCENES, _WRONG, _SHEET = 2, 2 / 3, 4 / 3, 2
"""Pictures of other sections, where so many samples are asked for as one: of attention one for so many."""
_COLOURS = 7
"""Runs that have a colour of their own."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the template shows."""

    title: str
    runs: Sequence[Subject]
    verdicts: Sequence[Verdict]
    comparison: Comparison | None
    charts: Sequence[Chart] | Missing
    settings: Settings | Missing
    reconstructions: Section[Reconstructions]
    sheets: Section[Sheet]
    predictions: Section[Predictions]
    scenes: Section[Scenes]
    probes: Section[Probes]
    probe_charts: Sequence[Chart] | Missing
    attention: Section[Attention]
    data: Section[Data]
    timing: Section[Timing]
    speed: Chart | Missing | None
    made: str

    @property
    def left_out(self) -> Iterator[tuple[str, Subject | None, str]]:
        """Sections and runs that they do not show, and why; no run where all are concerned."""
        sections: Mapping[str, Section[Any]] = {
            "Reconstructions": self.reconstructions,
            "Tokenizer": self.sheets,
            "Confusion": self.predictions,
            "Segmentation": self.scenes,
            "Probes": self.probes,
            "Attention": self.attention,
            "Data": self.data,
            "Time": self.timing,
        }
        for name, section in sections.items():
            for run, why in section.left_out:
                yield name, run, why
        of_all = {
            "Curves": self.charts,
            "Settings": self.settings,
            "Probes": self.probe_charts,
            "Speed": self.speed,
        }
        for name, found in of_all.items():
            if isinstance(found, Missing):
                yield name, None, found.why


def make_page(
    wheres: Sequence[str],
    kinds: Mapping[str, Kind],
    wishes: Wishes,
    access: Access,
    *,
    predicted: int = PREDICTED,
    progress: Callable[[str], object] = lambda _: None,
) -> Page:
    """Find everything.

    Args:
        wheres: run folders, step folders or URLs.
        kinds: what is known of each kind of run.
        wishes: where images and the tokenizer are, how many pictures, which weights, on which device.
        access: how URLs are reached.
        predicted: held-out images that a fine-tuned model predicts.
        progress: told what is done next.

    Raises:
        DataError: a folder is no run.
        StorageError: a store does not answer, or refuses.
    """
    progress("runs and numbers")
    runs = open_subjects(wheres, kinds, access, time.time())
    wishes = replace(wishes, samples=max(2, 2 * wishes.samples // (1 + len(runs))))
    models, count = Models(wishes, access), wishes.samples
    few = max(2, count // _ATTENTION)

    def section(name: str, kinds: Sequence[str], find: Callable[[Subject], Any]) -> Section[Any]:
        progress(name)
        return section_of(runs, lambda run: run.state.kind in kinds, find)

    backbones = ("pretraining", "classification", "segmentation")
    verdicts = [_verdict(run) for run in runs]
    probes = section("probes", backbones, probes_of)
    return Page(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=runs,
        verdicts=verdicts,
        comparison=compared(verdicts) if len(runs) > 1 else None,
        charts=attempted(lambda: charts_of(runs)),
        settings=attempted(lambda: settings_of(runs)),
        probes=probes,
        probe_charts=attempted(lambda: probe_charts([(part.run, part.content) for part in probes.parts])),
        reconstructions=section(
            "reconstructions", ("pretraining",), lambda run: reconstructions_of(run, wishes, access)
        ),
        sheets=section("the tokenizer", ("tokenizer",), sheet_of),
        predictions=section(
            "predictions",
            ("classification",),
            lambda run: predictions_of(run, models, predicted, round(_WRONG * count)),
        ),
        scenes=section(
            "label maps", ("segmentation",), lambda run: scenes_of(run, models, max(2, round(_SCENES * count)))
        ),
        attention=section("attention", backbones, lambda run: attention_of(run, models, few)),
        data=section("data", (*backbones, "tokenizer"), lambda run: data_of(run, models, _SHEET * count)),
        timing=section("time", (*backbones, "tokenizer"), timing_of),
        speed=attempted(lambda: speed_chart(runs)),
        made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _verdict(run: Subject) -> Verdict:
    found = attempted(partial(verdict_of, run))
    return Verdict(run, "not judged", "open", found.why, "", (), "") if isinstance(found, Missing) else found


def rendered(page: Page) -> str:
    """The page as HTML that needs no other file, runs no script, and sends no request."""
    environment = Environment(
        loader=PackageLoader("beit_dist.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    environment.filters["shown"] = printable
    environment.globals |= {
        "chart": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "colours": _COLOURS,
        "version": beit_dist.__version__,
    }
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "style.css")
    return environment.get_template("page.html").render(page=page, style=Markup(style))
