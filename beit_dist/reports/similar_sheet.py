"""Images and those most similar to them in one picture: a row for each query, which is its first image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from beit_dist.images.decoding import Pixels
from beit_dist.lettering import fitted, shortened
from beit_dist.reports.names import file_name, save, verbatim

_DPI, _SIDE = 130, 1.35
"""Inches: of an image."""
_TEXT, _HEADING = 0.44, 0.42
"""Inches: of the lines below an image, and of the title."""
_LETTERS = 7
_QUERY, _DUPLICATE = "#0072b2", "#d55e00"
_PIXELS = 176
MOST_ROWS = 200


class Shown(NamedTuple):
    """An image of the sheet."""

    pixels: Pixels | None
    """uint8 (H, W, 3); None: it is not where it was."""
    name: str
    said: str
    """Below the image, in front of its name."""
    duplicate: bool = False


def draw_similar(rows: Sequence[Sequence[Shown]], out: str | Path, title: str) -> None:
    """Write the picture; the first image of each row is the query."""
    across, down = max(map(len, rows)), len(rows)
    gap = 0.25
    size = (_SIDE * across + gap + 0.1, (_SIDE + _TEXT) * down + _HEADING)
    figure = Figure(figsize=size, dpi=_DPI)
    most = int(size[0] * _DPI / 7)
    verbatim(
        figure.text(0.05 / size[0], 1 - 0.5 * _HEADING / size[1], shortened(title, most), fontsize=9, va="center")
    )
    for line, row in enumerate(rows):
        bottom = size[1] - _HEADING - (line + 1) * (_SIDE + _TEXT) + _TEXT
        for place, shown in enumerate(row):
            left = 0.05 + _SIDE * place + (gap if place else 0)
            box = (left / size[0], bottom / size[1], (_SIDE - 0.08) / size[0], (_SIDE - 0.08) / size[1])
            _draw(figure.add_axes(box), shown, is_query=place == 0)
    save(figure, out)


def _draw(axes: Axes, shown: Shown, *, is_query: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.spines[:].set_visible(False)
    if shown.pixels is None:
        verbatim(axes.text(0.5, 0.5, "not there", ha="center", va="center", fontsize=_LETTERS, color="grey"))
    else:
        axes.imshow(_squared(shown.pixels), extent=(0, 1, 1, 0), interpolation="nearest")
    if is_query or shown.duplicate:
        axes.spines[:].set_visible(True)
        axes.spines[:].set(color=_QUERY if is_query else _DUPLICATE, linewidth=2)
    room = 72 * (_SIDE - 0.1)
    lines = f"{fitted(shown.said, room, _LETTERS)}\n{file_name(shown.name, room, _LETTERS)}"
    text = axes.text(0, 1.04, lines, fontsize=_LETTERS, va="top", linespacing=1.3)
    text.set_color(_DUPLICATE if shown.duplicate else "black")
    verbatim(text)


def _squared(pixels: Pixels) -> Pixels:
    """The whole image in the middle of a white square."""
    image = Image.fromarray(pixels)
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.BICUBIC)
    if max(image.size) < _PIXELS:
        factor = _PIXELS / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.NEAREST if factor > 3 else Image.Resampling.BICUBIC)
    square = Image.new("RGB", (_PIXELS, _PIXELS), (255, 255, 255))
    square.paste(image, ((_PIXELS - image.width) // 2, (_PIXELS - image.height) // 2))
    return np.asarray(square)
