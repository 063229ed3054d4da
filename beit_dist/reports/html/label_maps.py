"""What a segmentation finds in held-out images, in the colours of its classes, and how well it finds each."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit_dist.images.labelled.label_maps import IGNORED
from beit_dist.inference.segmentation import SegmentationModel
from beit_dist.reports.html.embedded import Pixels, data_uri
from beit_dist.reports.html.models import Models
from beit_dist.reports.html.section import Missing
from beit_dist.reports.html.subject import Subject
from beit_dist.stream.labelled.held_out import measured

_SIDE = 336
_COLOUR_SHARE = 0.62
_BASIC = (
    *("4269d0", "efb118", "ff725c", "6cc5b0", "3ca951", "ff8ab7", "a463f2", "97bbf5", "9c6b4e", "9498a0"),
    *("e6194b", "808000", "000075", "46f0f0", "bfef45", "fabed4", "469990", "dcbeff", "800000", "ffe119"),
)
"""Colours of the first classes; those of more go around the circle of hues."""


@dataclass(frozen=True)
class Class:
    """Of the legend."""

    name: str
    colour: str
    """``#rrggbb``"""
    iou: float | None
    """As last measured, 0 to 1; None where no pixel was, or was called, of it."""


@dataclass(frozen=True)
class Scene:
    """An image."""

    name: str
    image: str
    true: str
    found: str
    right: float
    """Share of its labelled pixels."""


@dataclass(frozen=True)
class Scenes:
    """Of a run."""

    classes: tuple[Class, ...]
    """The best found first."""
    scenes: tuple[Scene, ...]


def scenes_of(run: Subject, models: Models, pictures: int) -> Scenes | Missing:
    """Find the classes of the pixels of some held-out images.

    Raises:
        UserError: there is no whole checkpoint, or no held-out image, or one is damaged.
    """
    if not run.has_checkpoint:
        return Missing("The run has no checkpoint yet. Make the report again when it has saved one.")
    model = models.of(run)
    assert isinstance(model, SegmentationModel)
    found, palette = models.label_maps(run, model.classes), palette_of(len(model.classes))
    scenes = []
    for row in measured(len(found), pictures):
        pixels, truth = found.read(row, models.access)
        (segments,) = model.predict([pixels], thoroughly=False)
        known = truth != IGNORED
        scenes.append(
            Scene(
                found.files[row].name,
                data_uri(pixels, _SIDE),
                data_uri(overlaid(pixels, truth, palette), _SIDE),
                data_uri(overlaid(pixels, segments.labels, palette), _SIDE),
                float((segments.labels == truth)[known].mean()) if known.any() else 0.0,
            )
        )
    return Scenes(_legend(run, model.classes, palette), tuple(scenes))


def _legend(run: Subject, classes: tuple[str, ...], palette: NDArray[np.uint8]) -> tuple[Class, ...]:
    measured_last = run.history.held_out.lines[-1] if run.history and run.history.held_out.lines else {}
    ious = measured_last.get("iou") or {}
    legend = [
        Class(name, "#" + bytes(colour).hex(), float(ious[name]) if name in ious else None)
        for name, colour in zip(classes, palette, strict=False)
    ]
    return tuple(sorted(legend, key=lambda each: -1.0 if each.iou is None else each.iou, reverse=True))


def palette_of(classes: int) -> NDArray[np.uint8]:
    """uint8 (classes, 3): colours that differ, the same ones every time."""
    colours = [list(bytes.fromhex(each)) for each in _BASIC[:classes]]
    for number in range(len(colours), classes):
        hue, light = number * 0.618034 % 1.0, (0.42, 0.6, 0.75)[number % 3]
        colours.append([round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.75)])
    return np.array(colours, np.uint8)


def overlaid(pixels: Pixels, labels: Pixels, palette: NDArray[np.uint8]) -> Pixels:
    """An image in grey, in the colours of its pixels' classes; those of no class stay grey.

    Args:
        pixels: uint8 (H, W, 3).
        labels: uint8 (H, W), 255 is none.
    """
    grey = pixels.astype(np.float32).mean(2, keepdims=True).repeat(3, 2)
    known = labels < len(palette)
    colours = palette[np.where(known, labels, 0)].astype(np.float32)
    mixed = np.where(known[..., None], (1 - _COLOUR_SHARE) * grey + _COLOUR_SHARE * colours, grey)
    return np.asarray(mixed.round().clip(0, 255).astype(np.uint8))
