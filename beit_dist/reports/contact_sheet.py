"""A data set in one picture: samples beside what their tokens can redraw, and how the tokens are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from beit_dist.errors import printable
from beit_dist.reports.dataset import Inspection, Pixels

_CELL = 112  # pixels
_GAP = 6


def draw_sheet(found: Inspection, redrawn: Sequence[Pixels] | None, out: str | Path) -> None:
    """Write the picture.

    Args:
        redrawn: for each sample of the sheet what the tokenizer makes of its tokens, of any size; None to leave
            it out.
    """
    facts = found.facts()
    figure = Figure(figsize=(15, 8.5), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.7, 1], squeeze=False)[0]
    sheet = left.subplots()
    sheet.imshow(_mosaic([sample.image for sample in found.sheet], redrawn), interpolation="nearest")
    sheet.set_axis_off()
    beside = " beside what their tokens redraw" if redrawn else ""
    sheet.set_title(f"{len(found.sheet)} samples{beside}", fontsize=10)
    plots = right.subplots(3, 1)
    _draw_frequencies(plots[0], found.token_counts)
    _draw_codebook(plots[1], found.token_counts)
    _draw_labels(plots[2], found)
    figure.suptitle(
        f"{facts['samples']:,} samples × {facts['views']} views, {facts['tokens']['used']:,} of "
        f"{facts['vocabulary']:,} tokens used, perplexity {facts['tokens']['perplexity']:,.1f} "
        f"(in {facts['looked_at']:,} samples looked at)",
        fontsize=11,
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _mosaic(images: Sequence[Pixels], redrawn: Sequence[Pixels] | None) -> Pixels:
    """Cells of equal size on white, in rows that make the whole about as wide as high."""
    wide = 2 if redrawn else 1
    columns = max(1, math.ceil(math.sqrt(len(images) / wide)))
    rows = max(1, -(-len(images) // columns))
    step_x, step_y = wide * _CELL + _GAP, _CELL + _GAP
    canvas = np.full((rows * step_y, columns * step_x, 3), 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        parts = [image] if redrawn is None else [image, redrawn[number]]
        for place, part in enumerate(parts):
            y, x = row * step_y, column * step_x + place * _CELL
            canvas[y : y + _CELL, x : x + _CELL] = _fitted(part)
    return canvas


def _fitted(image: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.BILINEAR))


def _draw_frequencies(axes: Axes, counts: NDArray[np.int64]) -> None:
    shares = np.sort(counts[counts > 0])[::-1] / max(1, counts.sum())
    axes.loglog(np.arange(1, len(shares) + 1), shares, linewidth=1.5)
    axes.axhline(1 / len(counts), color="grey", linewidth=0.8, linestyle=":")
    axes.set_title("tokens by frequency; dotted: if all were as frequent", fontsize=9)
    axes.set_xlabel("rank", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_codebook(axes: Axes, counts: NDArray[np.int64]) -> None:
    width = math.ceil(math.sqrt(2 * len(counts)))
    cells = np.full(-(-len(counts) // width) * width, np.nan)
    cells[: len(counts)] = np.where(counts > 0, counts, np.nan)
    axes.set_facecolor("lightgrey")
    image = axes.imshow(cells.reshape(-1, width), norm=LogNorm(1, max(2, int(counts.max()))), aspect="auto")
    axes.set_title("the codebook, token by token; grey: not seen", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    if axes.figure is not None:
        axes.figure.colorbar(image, ax=axes).ax.tick_params(labelsize=8)


def _draw_labels(axes: Axes, found: Inspection) -> None:
    counted, what = (found.labels, "labels") if found.labels else (found.folders, "source folders")
    most = counted.most_common(15)[::-1]
    names = [printable(name) for name, _ in most]
    axes.barh(range(len(most)), [count for _, count in most])  # by number: names may be alike when they are cut
    ticks = axes.set_yticks(range(len(most)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
    for tick in ticks:
        tick.label1.set_parse_math(False)  # a $ is a $
    axes.set_ylim(-0.6, max(len(most), 6) - 0.4)  # few bars stay thin
    axes.set_title(f"{what}: {len(counted):,}" + (", the most frequent" if len(counted) > 15 else ""), fontsize=9)
    axes.tick_params(labelsize=7)
