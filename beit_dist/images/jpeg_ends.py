"""Whether a JPEG may have less data than pixels: libjpeg warns and makes up the rest, and Pillow tells nobody."""

from __future__ import annotations

import numpy as np
from PIL import Image

from beit_dist.images.iso_boxes import number
from beit_dist.images.jpeg_decoders import Pixels
from beit_dist.images.jpeg_scans import check_scans

_GREYS = range(126, 131)
"""Luminance of blocks without data, coefficients of 0, and what conversions to RGB and back make of it."""
_SIDE = 8
_SOS = 0xDA
_RESTARTS = b"\xff\xdd\x00\x04"
_ONE_COMPONENT = b"\xff\xda\x00\x08\x01"
"""Begins a scan header."""


def may_end_early(image: Image.Image, raw: bytes, pixels: Pixels | None, scale: int) -> bool:
    """Whether to decode the file again with more data: rarely, but for progressive files, where nothing shows it.

    Where there is one scan, what follows the end of its data is grey. Restart intervals end anywhere.

    Args:
        image: as Pillow opened it.
        pixels: what another decoder has made of it.
        scale: by how much they were shrunk in decoding.

    Raises:
        ImageRejectedError: whole restart intervals are missing.
    """
    headers = raw[: _first_scan(raw) + len(_ONE_COMPONENT)]
    restarts = _RESTARTS in headers
    several = "progressive" in image.info or (len(image.getbands()) > 1 and _ONE_COMPONENT in headers)
    if several:
        return True
    if restarts:
        check_scans(raw)
        side = _SIDE // scale
        grey = np.asarray(_luminance(image if pixels is None else Image.fromarray(pixels)))
        places = sorted({0, side // 2})
        tails = [grey[row::side, column::side] for row in places for column in places]
        rows, columns = (min(tail.shape[axis] for tail in tails) for axis in (0, 1))
        same = [np.abs(tail[:rows, :columns].astype(np.int16) - 128) <= 2 for tail in tails]
        return bool(np.logical_and.reduce(same).any())
    side = _SIDE // scale
    if pixels is None:
        corner = image.crop((max(0, image.width - side), image.height - 1, image.width, image.height))
        greys = _luminance(corner).tobytes()
    else:
        greys = bytes(_grey(*map(int, pixel)) for pixel in pixels[-1, -side:])
    return all(value in _GREYS for value in greys)


def _grey(red: int, green: int, blue: int) -> int:
    """As Pillow converts to L (ITU-R 601-2)."""
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _first_scan(raw: bytes) -> int:
    """Where its header is; the length of a file in which other bytes lie between the segments."""
    position = 2
    while raw[position : position + 1] == b"\xff" and position + 4 <= len(raw):
        if raw[position + 1] == _SOS:
            return position
        position += 2 + number(raw, position + 2, 2)
    return len(raw)


def _luminance(image: Image.Image) -> Image.Image:
    return image.getchannel("K") if image.mode == "CMYK" else image.convert("L")
