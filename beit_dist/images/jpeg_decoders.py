"""What turns a JPEG's data into pixels: Pillow, or simplejpeg where the user asks for it; smaller on request.

Both are libjpeg-turbo. simplejpeg writes RGB straight into one array; Pillow takes four bytes a pixel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.errors import ConfigError

Decoder = Literal["pillow", "simplejpeg"]
Pixels = NDArray[np.uint8]

SCALES = (8, 4, 2)
"""By how much a JPEG can be shrunk while it is decoded, largest first: the inverse DCT then makes 1, 2 or 4 pixels
of a block's 8 (libjpeg's ``scale_denom``)."""


def decoder_version(decoder: Decoder) -> str:
    """``pillow``, or ``simplejpeg`` with its version: what a job records. (Pillow's version has its own field.)

    Raises:
        ConfigError: it is not installed.
    """
    if decoder == "pillow":
        return "pillow"
    try:
        importlib.import_module("simplejpeg")
    except ImportError:
        raise ConfigError(
            "--decoder", decoder, "a decoder that is installed", "pip install simplejpeg, or use pillow."
        ) from None
    return f"simplejpeg {importlib.metadata.version('simplejpeg')}"


def can_shrink(image: Image.Image) -> bool:
    """Whether an opened image may be shrunk in decoding: a JPEG, and not a progressive one.

    At a small scale most of a progressive file's scans change nothing, so that damage in them would not show; and
    its time goes into unpacking the scans, which every scale needs.
    """
    return image.format == "JPEG" and "progressive" not in image.info


def load(image: Image.Image, raw: bytes, scale: int = 1, decoder: Decoder = "pillow") -> Pixels | None:
    """Load the pixels of an opened image; they are returned where simplejpeg has decoded it: (height, width, 3).

    What simplejpeg refuses, and it refuses whatever libjpeg warns of, Pillow decodes and judges.

    Args:
        image: opened, not loaded.
        raw: its file.
        scale: 1, or of a JPEG one of :data:`SCALES`: sides are divided by it, and rounded up.
    """
    width, height = image.size
    if decoder == "simplejpeg" and image.format == "JPEG" and image.mode == "RGB":
        pixels = _simplejpeg(raw, width, height, scale)
        if pixels is not None:
            return pixels
    if scale > 1:
        image.draft(image.mode, (width // scale, height // scale))
    image.load()
    return None


def _simplejpeg(raw: bytes, width: int, height: int, scale: int) -> Pixels | None:
    simplejpeg: Any = importlib.import_module("simplejpeg")
    least = {"min_height": height // scale, "min_width": width // scale} if scale > 1 else {}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(raw, "RGB", **least)
    except ValueError:
        return None
    return pixels if pixels.shape == (-(-height // scale), -(-width // scale), 3) else None
