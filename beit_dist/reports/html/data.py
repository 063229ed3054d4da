"""The data set of a run at a glance: how much there is, what its tokens say, and some of its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beit_dist.config.finetuning import FinetuningConfig
from beit_dist.config.pretraining import PretrainingConfig
from beit_dist.engine.durations import counted
from beit_dist.images.labelled.images import LabelledImages
from beit_dist.inference.classification import ClassificationModel
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.models.verdict import TokenUse, judge
from beit_dist.reports.dataset import VIEWS_SHOWN, inspect
from beit_dist.reports.html.charts import Chart, Line, draw
from beit_dist.reports.html.embedded import data_uri
from beit_dist.reports.html.models import Models
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject
from beit_dist.shards.manifest import load_manifest
from beit_dist.shards.statistics import load_statistics
from beit_dist.storage.opening import open_place

_LOOKED_AT = 64
"""Samples that are read: for pictures and labels, and for tokens where no statistics lie beside the data."""
_MOST_CLASSES = 20
_SIDE = 112
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Bar:
    """Of a list of counts."""

    name: str
    count: int
    share: float
    """Of the longest, 0 to 1."""


@dataclass(frozen=True)
class Data:
    """Of a run."""

    where: str
    facts: tuple[tuple[str, str], ...]
    pictures: tuple[tuple[str, str], ...]
    """Names and data URIs."""
    bars_of: str
    bars: tuple[Bar, ...]
    chart: Chart | None
    damaged: tuple[str, ...] = ()


def data_of(run: Subject, models: Models, pictures: int) -> Data | Missing:
    """Look at a run's data.

    Raises:
        UserError: it is gone or damaged.
    """
    if isinstance(run.config, PretrainingConfig):
        return _of_shards(run, run.config, pictures)
    if isinstance(run.config, FinetuningConfig):
        return _of_labelled(run, run.config, models)
    facts = []
    if (kept := run.facts.get("kept_aside")) is not None:
        facts.append(("held out", counted(int(kept), "image")))
    where = _text(run.config.data) if run.config else ""
    return Data(where, tuple(facts), (), "", (), None)


def _of_shards(run: Subject, config: PretrainingConfig, pictures: int) -> Data | Missing:
    if config.data is None:
        return Missing("The run's recipe names no data.")
    place = open_place(config.data, config.storage.access)
    manifest = load_manifest(place)
    views = min(VIEWS_SHOWN, manifest.views)
    found = inspect(place, manifest, _LOOKED_AT, pictures * views)
    known = load_statistics(place, manifest) or found.statistics
    layout, use = manifest.layout, TokenUse.of(known.tally.tokens)
    facts = [
        ("images", f"{manifest.samples:,}" + (f", {manifest.views} views of each" if manifest.views > 1 else "")),
        ("held out", counted(found.held_out.samples, "image") if found.held_out else "none"),
        (
            "left out",
            f"{counted(manifest.rejected, 'image')} that could not be used" if manifest.rejected else "none",
        ),
        (
            "a sample",
            f"{layout.image_size} px, patches of {layout.patch_size} px, {layout.grid}×{layout.grid} tokens",
        ),
        ("size", f"{in_bytes(sum(shard.bytes for shard in manifest.shards))}, {len(manifest.shards):,} shards"),
        ("tokens", str(use)),
        ("entropy of the tokens", f"{known.entropy:.2f} nats; uniform: {math.log(layout.vocabulary):.2f}"),
        ("verdict on them", "{0.word}. {0.why}".format(judge(use))),
        ("digest", manifest.digest[:12]),
    ]
    if run.facts.get("dataset") not in (None, manifest.digest):
        facts.append(("note", "this is no longer the data that the run was trained on: its digest is another one"))
    counted_names, what = (found.labels, "labels") if found.labels else (found.folders, "source folders")
    few = {sample.sample_id: sample for sample in reversed(found.sheet)}
    return Data(
        config.data,
        tuple(facts),
        tuple((few[key].source, data_uri(few[key].image, _SIDE)) for key in sorted(few)[:pictures]),
        f"{what} among {counted(found.looked_at, 'sample')}" if len(counted_names) > 1 else "",
        bars_of(counted_names.most_common(_MOST_CLASSES)) if len(counted_names) > 1 else (),
        _token_chart(run, known.tally.tokens),
        tuple(found.damaged),
    )


def _token_chart(run: Subject, counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Chart | None:
    shares = 100 * np.sort(counts[counts > 0])[::-1] / max(1, counts.sum())
    return draw(
        "Tokens by frequency",
        [Line(np.arange(1.0, len(shares) + 1), shares, "smooth", run.number)],
        along="rank of the token",
        summary=f"The commonest token has {shares[0]:.1f}% of all positions." if len(shares) else "No tokens.",
        help="Percent of all positions, the commonest token first. The flatter, the more a position says.",
        log=True,
    )


def _of_labelled(run: Subject, config: FinetuningConfig, models: Models) -> Data:
    model = models.of(run)
    if isinstance(model, ClassificationModel):
        found = models.labelled(run, model.classes)
        return _of_classes(config, found)
    assert isinstance(model, SegmentationModel)
    maps = models.label_maps(run, model.classes)
    facts = (("classes", f"{len(maps.classes):,}"), ("held-out images with label maps", f"{len(maps):,}"))
    return Data(_text(config.data), facts, (), "", (), None)


def _of_classes(config: FinetuningConfig, found: LabelledImages) -> Data:
    counts = found.counts()
    order = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
    facts = (("classes", f"{len(found.classes):,}"), ("held-out images", f"{len(found):,}"))
    bars = bars_of([(found.classes[number], int(counts[number])) for number in order])
    more = "" if len(found.classes) <= _MOST_CLASSES else f"; the {_MOST_CLASSES} most frequent classes"
    return Data(_text(config.data), facts, (), f"held-out images of each class{more}", bars, None)


def bars_of(counts: Sequence[tuple[str, int]]) -> tuple[Bar, ...]:
    """Bars as long as the counts, the longest of which is 1."""
    most = max((count for _, count in counts), default=1)
    return tuple(Bar(name, count, count / max(1, most)) for name, count in counts)


def in_bytes(number: float) -> str:
    """``1.2 GB``"""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"


def _text(sources: str | Sequence[str] | None) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources or ())
