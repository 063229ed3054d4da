"""What a model paints into masked patches: images, their masks, and its predictions as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from beit_dist.errors import ConfigError
from beit_dist.inference.painting import Painter, Reconstruction, painted
from beit_dist.models.mim import MaskedImageModel
from beit_dist.reports.names import file_name, save, verbatim
from beit_dist.reports.samples import ShardSample
from beit_dist.shards.manifest import Manifest
from beit_dist.stream.masking.base import Masks

_LABEL = 13
"""Letters of a line beside a row."""
_ACROSS = 6
"""Samples side by side."""
_SIDE = 1.3
"""Inches: of a picture and the gap beside it."""
_LETTERS, _ROOM = 8, 72 * 0.93 * _SIDE
"""Points: size of the letters over a picture, and how wide a line of them may be."""


def check_fit(model: MaskedImageModel, manifest: Manifest) -> None:
    """Refuse shards of another shape than the model's images.

    Raises:
        ConfigError: they have one.
    """
    for name in model.head.shared_with_shards:
        got, expected = getattr(manifest.layout, name), getattr(model.config, name)
        if got != expected:
            raise ConfigError(
                f"data: {name}",
                got,
                f"the run's {expected}",
                "Name the shards the run was trained on with --data.",
            )


def reconstruct(
    model: MaskedImageModel, samples: Sequence[ShardSample], masks: Masks, paint: Painter
) -> list[Reconstruction]:
    """Have the model predict the masked patches of each sample, and paint them.

    Args:
        model: with the run's weights; runs on the device it is on.
        samples: at least one.
        masks: those of the run; epoch 0's are used.
        paint: for the model's target.
    """
    ids = [sample.sample_id for sample in samples]
    return painted(
        model,
        torch.from_numpy(np.stack([sample.patches for sample in samples])),
        torch.from_numpy(np.stack([sample.tokens for sample in samples])).long(),
        torch.from_numpy(masks.positions_of([0] * len(samples), ids)).long(),
        [sample.source for sample in samples],
        paint,
    )


def draw_panel(columns: Sequence[Reconstruction], out: str | Path, title: str = "") -> None:
    """Write a PNG with a column for each sample and a row for each kind of picture, six samples side by side.

    The masked area is outlined in the painted pictures: only there does the model's work show.
    """
    names = ("image", "what the model sees", *columns[0].painted)
    labels = ["\n".join(textwrap.wrap(name, _LABEL)) for name in names]
    bands = [columns[first : first + _ACROSS] for first in range(0, len(columns), _ACROSS)]
    across, heading = len(bands[0]), textwrap.wrap(title, max(30, 13 * len(bands[0]) + 8))
    size = (_SIDE * across + 1.1, (_SIDE * len(labels) + 0.6) * len(bands) + 0.2 * len(heading) + 0.1)
    spacing = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=size, dpi=150, layout=spacing)
    grid = figure.subplots(len(labels) * len(bands), across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, band in enumerate(bands):
        rows = grid[number * len(labels) : (number + 1) * len(labels)]
        for place, column in enumerate(band):
            _draw_column(list(rows[:, place]), column)
        for axes, label in zip(rows[:, 0], labels, strict=True):
            axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    verbatim(figure.suptitle("\n".join(heading), fontsize=11))
    save(figure, out)


def _draw_column(axes: Sequence[Axes], column: Reconstruction) -> None:
    """A sample, from top to bottom."""
    pictures = [column.image, column.masked, *column.painted.values()]
    for place, picture in zip(axes, pictures, strict=True):
        place.set_axis_on()
        place.imshow(picture, interpolation="nearest")
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
    for place, picture in zip(axes[2:], pictures[2:], strict=True):
        _outline(place, column.hidden, picture.shape[0])
    verbatim(axes[0].set_title(file_name(column.name, _ROOM, _LETTERS), fontsize=_LETTERS))
    axes[-1].set_xlabel(column.said, fontsize=9)


def _outline(axes: Axes, hidden: NDArray[np.bool_], side: int) -> None:
    """A line around the masked area of a square picture of ``side`` pixels."""
    cell = side // len(hidden)
    area = np.kron(hidden, np.ones((cell, cell)))
    for colour, width in (("black", 1.6), ("white", 0.8)):  # to be seen on any picture
        axes.contour(area, levels=[0.5], colors=colour, linewidths=width)
