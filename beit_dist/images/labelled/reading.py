"""Pixels and label maps of files. What cannot be used is an error that names the file: nothing is skipped."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.errors import DataError, printable
from beit_dist.images.damage import check_whole
from beit_dist.images.decoding import MAX_PIXELS, decode
from beit_dist.images.files import ImageFile
from beit_dist.images.rejection import ImageRejectedError
from beit_dist.storage.access import Access

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
"""PNG's colour types (PNG specification, 11.2.1)."""


def read_image(file: ImageFile, access: Access) -> Image.Image:
    """The image in a file: upright, RGB.

    Raises:
        DataError: it is damaged, gone, or no image.
        StorageError: a store failed for as long as it was tried again.
    """
    try:
        return decode(file.read(access))
    except ImageRejectedError as error:
        raise _unusable(file, str(error)) from None


def read_map(file: ImageFile, access: Access) -> NDArray[np.uint16]:
    """The numbers in a label map: uint16 ``(H, W)``. Raises what :func:`read_image` does."""
    try:
        return _decode_map(file.read(access))
    except ImageRejectedError as error:
        raise _unusable(file, str(error)) from None


def shown(file: ImageFile) -> str:
    """A file for messages: where it lies, and its name, which an archive's place does not tell."""
    where = str(file)
    return printable(where if file.name in where else f"{where}, {file.name}")


def _unusable(file: ImageFile, reason: str) -> DataError:
    return DataError(f"{shown(file)}: {reason}. Mend or remove it")


def _decode_map(raw: bytes) -> NDArray[np.uint16]:
    """A PNG's palette indices or grey values, as they were written: Pillow scales those of 2 and 4 bits."""
    if not raw.startswith(_PNG) or len(raw) < 26:
        raise ImageRejectedError("not a PNG, as label maps must be", "not_an_image")
    bits, colours = raw[24], raw[25]
    if colours not in (_GREY, _PALETTE):
        reason = "a label map in colours: its pixels must be numbers of classes, as palette indices or grey values"
        raise ImageRejectedError(reason, "value_range")
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageRejectedError(f"more than {MAX_PIXELS:,} pixels", "too_large")
            image.load()
            check_whole(image, raw)
            values = np.asarray(image)
    except (ImageRejectedError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers let errors of any type through for damaged files
        raise ImageRejectedError(f"{type(error).__name__}: {str(error)[:200]}", "damaged") from None
    scale = 255 // (2**bits - 1) if colours == _GREY and bits in (2, 4) else 1
    return (values // scale).astype(np.uint16) if scale > 1 else values.astype(np.uint16)
