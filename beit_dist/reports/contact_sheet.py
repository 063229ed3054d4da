"""A data set in one picture: the views of images beside what their tokens redraw, and how the tokens are used."""

from __future__ import annotations

import math
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image

from beit_dist.lettering import shortened
from beit_dist.reports.dataset import VIEWS_SHOWN, Inspection, decibels, error_of
from beit_dist.reports.names import file_name, save, verbatim
from beit_dist.reports.samples import Pixels
from beit_dist.shards.statistics import Statistics

_DPI = 130
_WIDTH, _GAP, _TEXT_LINE = 900, 8, 16
"""Pixels: of the pictures side by side, between images, of a line of text."""
_ACROSS = 8
"""Most pictures side by side."""
_MOST, _FEW = 15, 4
"""Bars: most that there are, and room for at least."""
_LETTERS = 7
"""Points: size of the letters over pictures."""


class Label(NamedTuple):
    """A line of text over pictures."""

    x: int
    y: int
    width: int
    text: str


class Mosaic(NamedTuple):
    """Pictures in rows of images, the views of an image side by side."""

    pixels: Pixels
    labels: list[Label]
    cell: int
    """Pixels of a picture's side."""


def draw_sheet(found: Inspection, out: str | Path) -> None:
    """Write the picture: of each image of the sheet its name, its views, and what the tokenizer makes of each."""
    mosaic = lay_out(found)
    height, width = mosaic.pixels.shape[:2]
    heading, bars = _heading(found), min(_MOST, max(_FEW, len(found.labels or found.folders)))
    parts = [24 * len(heading) + 16, height, 420, 18 * bars + 70]
    figure = Figure(figsize=(width / _DPI, sum(parts) / _DPI), dpi=_DPI)
    title, sheet, plots, names = figure.subfigures(4, 1, height_ratios=parts, hspace=0, squeeze=False)[:, 0]
    verbatim(title.text(0.5, 0.5, "\n".join(heading), fontsize=10, ha="center", va="center"))
    _draw_mosaic(sheet, mosaic)
    figure.set_layout_engine("constrained")
    frequencies, codebook = plots.subplots(1, 2)
    _draw_frequencies(frequencies, found.statistics)
    _draw_codebook(codebook, found.statistics)
    _draw_labels(names.subplots(), found)
    save(figure, out)


def lay_out(found: Inspection) -> Mosaic:
    """The pictures of the sheet on white, and what is written over them."""
    wide = 2 if found.redrawn else 1
    images, views = found.images, min(VIEWS_SHOWN, found.manifest.views)
    lines, columns = 2 if views > 1 or found.redrawn else 1, max(1, _ACROSS // (views * wide))
    cell = _WIDTH // (columns * views * wide)
    group = views * wide * cell
    step_x, step_y = group + _GAP, cell + lines * _TEXT_LINE + _GAP
    shape = (max(1, -(-len(images) // columns)) * step_y, columns * step_x + _GAP, 3)
    canvas, labels, number = np.full(shape, 255, np.uint8), [], 0
    for place, samples in enumerate(images):
        row, column = divmod(place, columns)
        x, y = column * step_x + _GAP, row * step_y
        labels.append(Label(x, y, group, file_name(samples[0].source, 72 * (group - _GAP) / _DPI, _LETTERS)))
        for sample in samples:
            said = [f"view {sample.view}"] if found.manifest.views > 1 else []
            parts = [sample.image]
            if found.redrawn:
                parts.append(found.redrawn[number])
                said.append(f"redrawn {decibels(error_of(*parts)):.1f} dB")
            labels.append(Label(x, y + _TEXT_LINE, wide * cell, ", ".join(said)))
            for part in parts:
                top = y + lines * _TEXT_LINE
                canvas[top : top + cell, x : x + cell] = _fitted(part, cell)
                x += cell
            number += 1
    return Mosaic(canvas, [label for label in labels if label.text], cell)


def _heading(found: Inspection) -> list[str]:
    manifest, known = found.manifest, found.statistics
    views = f" × {manifest.views} views" if manifest.views > 1 else ""
    of = "" if known.whole else f" in {known.tally.samples:,} samples"
    redrawn = [f"redrawn from tokens: PSNR {found.psnr:.1f} dB in this picture"] if found.redrawn else []
    return [
        f"{shortened(PurePath(found.where).name, 50)}: {manifest.samples:,} images{views}",
        f"{known.used:,} of {manifest.layout.vocabulary:,} tokens in use, perplexity {known.perplexity:,.1f}{of}",
        *redrawn,
    ]


def _draw_mosaic(figure: SubFigure, mosaic: Mosaic) -> None:
    height, width = mosaic.pixels.shape[:2]
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(mosaic.pixels, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    axes.set_axis_off()
    for label in mosaic.labels:
        text = axes.text(label.x, label.y + _TEXT_LINE / 2, label.text, fontsize=_LETTERS, va="center")
        verbatim(text)
        area = Bbox([[label.x, label.y - _TEXT_LINE], [label.x + label.width, label.y + 2 * _TEXT_LINE]])
        text.set_clip_box(TransformedBbox(area, axes.transData))
        text.set_clip_on(True)


def _fitted(image: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def _draw_frequencies(axes: Axes, known: Statistics) -> None:
    counts = known.tally.tokens
    shares = np.sort(counts[counts > 0])[::-1] / max(1, counts.sum())
    axes.loglog(np.arange(1, len(shares) + 1), shares, color="#0072b2", linewidth=1.5, marker="o", markevery=[0])
    axes.axhline(1 / len(counts), color="grey", linewidth=0.9, linestyle=":")
    commonest = f"commonest: token {counts.argmax()}, {100 * known.commonest_share:.1f} %"
    title = f"tokens by frequency; dotted: all equally frequent\nentropy {known.entropy:.2f} nats; {commonest}"
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_xlabel("rank", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_codebook(axes: Axes, known: Statistics) -> None:
    counts = known.tally.tokens
    width = math.ceil(math.sqrt(2 * len(counts)))
    cells = np.full(-(-len(counts) // width) * width, np.nan)
    cells[: len(counts)] = np.where(counts > 0, counts, np.nan)
    axes.set_facecolor("lightgrey")
    image = axes.imshow(cells.reshape(-1, width), norm=LogNorm(1, max(2, int(counts.max()))), aspect="auto")
    axes.set_title(
        f"the codebook, token by token; grey: not seen\n{known.used:,} of {len(counts):,} in use",
        fontsize=8,
        loc="left",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    if axes.figure is not None:
        axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)


def _draw_labels(axes: Axes, found: Inspection) -> None:
    counted, what = (found.labels, "labels") if found.labels else (found.folders, "source folders")
    most = counted.most_common(_MOST)[::-1]
    axes.barh(range(len(most)), [count for _, count in most], color="#0072b2")  # by number: names may be alike
    for tick in axes.set_yticks(range(len(most)), [shortened(name, 24) for name, _ in most]):
        verbatim(tick.label1)
    axes.set_ylim(-0.6, max(len(most), _FEW) - 0.4)  # few bars stay thin
    axes.set_title(
        f"{what}: {len(counted):,}" + (", the most frequent" if len(counted) > _MOST else ""),
        fontsize=8,
        loc="left",
    )
    axes.tick_params(labelsize=7)
