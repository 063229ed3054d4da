"""Where a model looks: how the last block's queries of chosen patches attend (the paper's figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from beit_dist.reports.html.embedded import Pixels, data_uri, enlarged
from beit_dist.reports.html.models import Models, Seen
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject

_SIDE = 208
_GREY = 0.3
"""The image's share in a map's colours."""
_PLAIN = 6.0
"""A weight so many times the mean is bright, even if none is larger: attention to all alike is dark everywhere."""


@dataclass(frozen=True)
class Gazes:
    """One image: where its chosen patches look."""

    name: str
    image: str
    """With the chosen patches marked."""
    queries: tuple[tuple[str, str], ...]
    """Of each chosen patch where it lies, in words, and its map."""


@dataclass(frozen=True)
class Attention:
    """Of a run."""

    layer: int
    heads: int
    images: tuple[Gazes, ...]


def attention_of(run: Subject, models: Models, pictures: int) -> Attention | Missing:
    """Maps of the last block, the mean of its heads, for a patch in each quarter of held-out images.

    Raises:
        UserError: there is no whole checkpoint, or no image.
    """
    if not run.has_checkpoint:
        return Missing("The run has no checkpoint yet. Make the report again when it has saved one.")
    model, seen = models.of(run), models.images(run, pictures)
    with torch.no_grad():
        maps = model.attention(torch.from_numpy(np.stack([image.pixels for image in seen]))).float().cpu()
    config = model.prepare.config
    grid = config.grid
    found = tuple(_gazes(image, own.mean(0).numpy()[1:, 1:], grid) for image, own in zip(seen, maps, strict=True))
    return Attention(config.depth, maps.shape[1], found)


def _gazes(seen: Seen, weights: NDArray[np.float32], grid: int) -> Gazes:
    """Of an image.

    Args:
        weights: (P, P), rows are queries.
    """
    pixels = enlarged(seen.pixels, _SIDE)
    chosen = interesting(pixels, grid)
    marked = pixels.copy()
    for row, column in chosen:
        _mark(marked, row, column, grid)
    queries = []
    for row, column in chosen:
        heat = heated(pixels, weights[row * grid + column].reshape(grid, grid))
        _mark(heat, row, column, grid)
        queries.append((f"row {row + 1}, column {column + 1}", data_uri(heat, _SIDE)))
    return Gazes(seen.name, data_uri(marked, _SIDE), tuple(queries))


def interesting(pixels: Pixels, grid: int) -> list[tuple[int, int]]:
    """The patch with the most contrast in each quarter of an image, away from edges where there is room."""
    cell = pixels.shape[0] // grid
    grey = pixels.astype(np.float32).mean(2)[: cell * grid, : cell * grid]
    contrast = grey.reshape(grid, cell, grid, cell).std((1, 3))
    edge, half = 1 if grid >= 6 else 0, max(1, grid // 2)
    between = 1 if grid >= 8 else 0
    halves = range(edge, half - between), range(half + between, grid - edge)
    found = []
    for rows in halves:
        for columns in halves:
            places = [(row, column) for row in rows for column in columns]
            if places:
                found.append(max(places, key=lambda place: contrast[place]))
    return found


def heated(pixels: Pixels, weights: NDArray[np.float32]) -> Pixels:
    """An image in dark grey under a map of weights, the largest of which is brightest."""
    side = pixels.shape[0]
    most = max(float(weights.max()), _PLAIN / weights.size)
    scaled = np.sqrt(weights / most)  # of few large weights the others stay visible
    as_image = Image.fromarray((255 * scaled).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    share = np.asarray(as_image, np.float32) / 255
    colours = 255 * colormaps["inferno"](share)[..., :3]
    grey = pixels.astype(np.float32).mean(2, keepdims=True)
    mixed = _GREY * grey + (1 - _GREY) * colours
    return np.asarray(mixed.clip(0, 255).astype(np.uint8))


def _mark(pixels: Pixels, row: int, column: int, grid: int) -> None:
    """Draw a frame around a patch, to be seen on any colours."""
    cell = pixels.shape[0] // grid
    top, left = row * cell, column * cell
    for inset, colour in ((0, (0, 0, 0)), (1, (0, 255, 255))):
        first_y, last_y = top + inset, top + cell - 1 - inset
        first_x, last_x = left + inset, left + cell - 1 - inset
        if last_y <= first_y or last_x <= first_x:
            return
        pixels[first_y, first_x : last_x + 1] = colour
        pixels[last_y, first_x : last_x + 1] = colour
        pixels[first_y : last_y + 1, first_x] = colour
        pixels[first_y : last_y + 1, last_x] = colour
