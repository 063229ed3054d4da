"""Any mode that Pillow opens to RGB, with what the file says about its samples and Pillow leaves to the caller."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.images.jpeg2000_tiles import sample_bits
from beit_dist.images.rejection import ImageRejectedError

_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_LARGEST = (281, 341)
"""MaxSampleValue and SMaxSampleValue. Some writers put the brightest pixel there, so only 2^n - 1 counts."""
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2
"""TIFF 6.0, sections 8 and 19."""

_DARK = {12: 4095, 14: 16383}
"""By bits: 16-bit samples that stay below are most likely such data, as cameras, scanners and raw converters write
it. If not, the picture has no pixel of a quarter of white, and at most 64 of 256 levels."""
_WHITE = (255, 255, 255)
_LABELS, _VOID, _FLAT = 63, 255, 0.8
"""A grey PNG is most likely a label map if its values, void left aside, are at most the first, and such a share of
them equal their right neighbours. Of CamVid's at 320×240 px, 0.90 to 0.996 do."""


class Samples(NamedTuple):
    """What a file says about its samples."""

    bits: int = 8
    """Of memory, each."""
    white: int | None = None
    """The largest value, where the file gives one of less than ``bits`` (or Pillow has scaled to ``bits``)."""
    white_is_zero: bool = False
    signed: bool = False
    separate: bool = False
    """One plane after another."""


def samples(image: Image.Image, raw: bytes) -> Samples:
    """What the file says; ``image`` is opened and not yet loaded."""
    if image.format == "PNG":
        return Samples(bits=raw[24])  # IHDR comes first; sBIT changes nothing, as samples fill their 16 bits
    if image.format == "PPM":
        arguments = getattr(image, "tile", [])[0].args
        largest = arguments[-1] if isinstance(arguments, tuple) and isinstance(arguments[-1], int) else 0
        if 255 < largest < 65535:
            return Samples(bits=16, white=65535)
        return Samples(bits=16 if largest == 65535 or image.mode.startswith("I") else 8)
    if image.format == "JPEG2000":  # Pillow scales fewer than 16 bits to 16, or to 8
        bits = sample_bits(raw)
        return Samples(bits=16 if bits > 8 else 8, white=65535 if 8 < bits < 16 else None)
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return Samples(bits=16 if image.mode.startswith("I") else 8)
    bits = max(tags.get(_BITS, (1,)))
    given = [max(value) if isinstance(value, tuple) else value for tag in _LARGEST if (value := tags.get(tag))]
    white = next((value for value in given if 255 < value < 2**bits - 1 and not value & (value + 1)), None)
    return Samples(
        bits=bits,
        white=white or (4095 if bits == 12 else None),
        white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        signed=_SIGNED in tags.get(_SAMPLE_FORMAT, ()),
        separate=tags.get(_PLANES) == _SEPARATE,
    )


def to_rgb(image: Image.Image, raw: bytes, said: Samples) -> Image.Image:
    """RGB of the same size. Transparent pixels show white.

    Args:
        image: loaded.
        said: from :func:`samples`.

    Raises:
        ImageRejectedError: which value is white is not known, or values are labels; of the kind ``value_range``.
    """
    if image.mode.startswith("I"):
        return _from_grey(np.asarray(image), said, image.info.get("transparency"))
    if image.mode == "F":
        raise _unknown("floating-point pixels, whose range is not known; convert them to 8 bits")
    if image.mode == "L" and image.format == "PNG":
        _check_labels(np.asarray(image))
    if said.bits > 8:
        _check_colours(image, said)
    transparent = image.info.get("transparency")
    if image.format == "PNG" and said.bits in (2, 4) and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**said.bits - 1)  # Pillow scales the pixels alone
    if image.mode == "RGB" and said.bits == 16 and isinstance(transparent, tuple):
        return _without_colour(image, raw, transparent)
    if image.mode == "RGB" and transparent is None:
        return image.copy()  # the caller closes the original
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*_WHITE, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _unknown(reason: str) -> ImageRejectedError:
    return ImageRejectedError(reason, "value_range")


def _from_grey(values: NDArray[np.generic], said: Samples, transparent: object) -> Image.Image:
    """Grey of more than 8 bits; Pillow's own conversion clips at 255 and leaves out white and transparency."""
    if said.signed or (said.bits > 16 and said.white is None):
        kind = f"{said.bits}-bit {'signed' if said.signed else 'unsigned'} integers"
        raise _unknown(f"{kind}: it is not known which value is white; convert them to 8 bits")
    wide = values.astype(np.int64)
    shown = wide != transparent if isinstance(transparent, int) else np.ones(wide.shape, bool)
    largest = int(wide[shown].max(initial=0))
    white = said.white or 65535
    if wide.min() < 0 or largest > white:
        raise _unknown(f"grey values {wide.min()} to {largest}, outside 0 to {white}; convert them to 8 bits")
    if said.white is None and shown.any():
        _check_dark(largest)
    grey = (wide * 255 + white // 2) // white
    if said.white_is_zero:
        grey = 255 - grey
    return Image.fromarray(np.where(shown, grey, 255).astype(np.uint8)).convert("RGB")


def _check_colours(image: Image.Image, said: Samples) -> None:
    """Of colours and of grey with alpha, Pillow keeps the upper 8 of 16 bits."""
    if said.separate:
        raise _unknown(
            f"{said.bits}-bit samples in separate planes, which Pillow misreads; convert them to 8 bits"
        )
    if said.signed or (said.white is not None and said.white != 65535):
        what = "signed samples" if said.signed else f"samples up to {said.white:,}"
        raise _unknown(f"{what} in {said.bits} bits, but Pillow reads only the upper 8; convert them to 8 bits")
    if said.white is None:
        bands = [image.getchannel(band) for band in image.getbands() if band not in ("A", "a")]
        largest = max(int(np.asarray(band).max()) for band in bands)
        _check_dark(largest << 8 | 255)


def _check_labels(values: NDArray[np.generic]) -> None:
    """A label map would be learnt from as a black picture."""
    largest = int(values.max(initial=0, where=values != _VOID))
    if 0 < largest <= _LABELS and np.mean(values[:, 1:] == values[:, :-1]) >= _FLAT:
        what = f"flat areas of grey values up to {largest}: a label map, or nearly black"
        raise _unknown(f"{what}; keep label maps in another folder")


def _check_dark(largest: int) -> None:
    for bits, dark in _DARK.items():
        if largest <= dark:
            what = f"16-bit samples of at most {largest:,}: {bits} bits without a tag that says so, or very dark"
            raise _unknown(f"{what}; convert them to 8 bits")


def _without_colour(image: Image.Image, raw: bytes, transparent: tuple[int, ...]) -> Image.Image:
    """A 16-bit PNG with white for the colour that its tRNS chunk names in all 16 bits."""
    upper = np.asarray(image)
    with Image.open(io.BytesIO(raw), formats=["PNG"]) as again:
        again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]  # the other byte of each pair
        lower = np.asarray(again)
    hidden = ((upper.astype(np.uint16) << 8 | lower) == transparent).all(axis=-1, keepdims=True)
    return Image.fromarray(np.where(hidden, np.uint8(255), upper))
