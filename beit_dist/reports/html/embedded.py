"""Pictures inside the page: small files in data URIs, so that the page needs nothing else."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

SIDE = 224
"""Pixels of a picture's longer side on the page, at most; small ones are enlarged by a whole factor."""
_QUALITY = 82


def data_uri(pixels: Pixels, side: int = SIDE) -> str:
    """A picture, uint8 (H, W, 3), as ``data:image/webp;base64,...``."""
    return as_uri(Image.fromarray(enlarged(pixels, side)), side)


def as_uri(image: Image.Image, longest: int) -> str:
    """A picture, made smaller where it is larger than ``longest`` pixels."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def enlarged(pixels: Pixels, side: int = SIDE) -> Pixels:
    """A small picture, each pixel of which becomes a square: its patches stay what they are."""
    factor = max(1, side // max(pixels.shape[:2]))
    return np.asarray(np.repeat(np.repeat(pixels, factor, 0), factor, 1), np.uint8)


def outlined(pixels: Pixels, hidden: NDArray[np.bool_]) -> Pixels:
    """A square picture with a line around an area of its patches, to be seen on any colours.

    Args:
        pixels: (S, S, 3).
        hidden: (grid, grid), the patches of the area; grid divides S.
    """
    cell = max(1, pixels.shape[0] // len(hidden))
    area = np.kron(hidden, np.ones((cell, cell), np.bool_))
    drawn: Pixels = pixels[: len(area), : len(area)].copy()
    drawn[_edge(area)] = 255
    drawn[_edge(~area)] = 0
    return drawn


def _edge(area: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of an area beside others that are not of it; the picture's own edge is none."""
    around = np.pad(area, 1, mode="edge")
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return np.asarray(area & ~inner, np.bool_)
