"""Label maps as PNGs, and over their images: what ``beit predict`` writes for a segmentation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.decoding import Pixels

_BITS = 8
_LARGEST = 255


def palette(entries: int) -> Pixels:
    """Colours that are told apart, uint8 (entries, 3): those of PASCAL VOC, without the first one, black.

    As in VOCdevkit's ``VOClabelcolormap.m``, the bits of a number are dealt to red, green and blue in turn, the
    lowest into the highest.
    """
    numbers = np.arange(1, entries + 1)
    colours = np.zeros((entries, 3), np.int64)
    for place in range(_BITS):
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * place + channel) & 1) << (_BITS - 1 - place)
    return colours.astype(np.uint8)


def map_file(labels: Pixels, first: int, classes: int) -> bytes:
    """A PNG whose values are the numbers that the run's own label maps have.

    Args:
        labels: uint8 (H, W), numbers of classes from 0.
        first: the number of the first class in the run's maps.
        classes: how many there are.
    """
    raw = io.BytesIO()
    if first + classes - 1 > _LARGEST:  # palettes have 256 entries
        Image.fromarray(labels.astype(np.uint16) + first).save(raw, "PNG")
        return raw.getvalue()
    image = Image.fromarray((labels + first).astype(np.uint8)).convert("P")
    colours = np.zeros((256, 3), np.uint8)
    colours[first : first + classes] = palette(classes)
    image.putpalette(colours.tobytes())
    image.save(raw, "PNG")
    return raw.getvalue()


def overlay_file(pixels: Pixels, labels: Pixels, classes: int, strength: float = 0.5) -> bytes:
    """A PNG of an image, uint8 (H, W, 3), with the classes' colours over it.

    Args:
        strength: of the colours, 0 to 1.
    """
    mixed = (1 - strength) * pixels + strength * palette(classes)[labels]
    raw = io.BytesIO()
    Image.fromarray((mixed + 0.5).astype(np.uint8)).save(raw, "PNG")
    return raw.getvalue()


def shares(labels: Pixels, classes: int) -> NDArray[np.float32]:
    """The share of the pixels that each class has: (classes,)."""
    counts = np.bincount(labels.reshape(-1), minlength=classes)
    return (counts / labels.size).astype(np.float32)


def hexadecimal(colours: Pixels) -> Sequence[str]:
    """Colours as web pages write them."""
    return ["#" + bytes(colour).hex() for colour in colours]
