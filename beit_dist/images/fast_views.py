"""Views of pixel version 2: BEiT's augmentation of :mod:`beit_dist.images.decoding`, made with less work.

Boxes, flips and the draws of the jitter are those of version 1. What differs:

- A JPEG is decoded to 1/2, 1/4 or 1/8 of its size where all its crops stay twice as large as the view. The crop's
  box is then rounded to whole pixels of the smaller image; what is recorded is the rounded one.
- Resizing is PyTorch's, which computes as Pillow does with weights of 16 bits in place of 24.
- The mean grey that contrast turns around is that of some 20,000 pixels in rows far apart.
- Brightness and contrast next to one another are one table. This changes nothing.

Apart from the decoding of large JPEGs, values differ by 1 now and then (docs/images.md says how many do).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from beit_dist.errors import ConfigError
from beit_dist.images.decoding import (
    CROP_AREA,
    Augment,
    Box,
    Picture,
    Pixels,
    View,
    centred_square,
    crop_box,
    decode_picture,
    flips,
    jitter_of,
)
from beit_dist.images.jpeg_decoders import SCALES, Decoder

_LEFT = 2
"""Sides of the view that the shortest side of a crop keeps at least when a JPEG is shrunk in decoding."""
_GREY_PIXELS = 16_384
"""Of a whole image, at least, whole rows far apart, for its mean grey; about twice as many at most."""
_RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))


def check_resizing() -> None:
    """Check that this PyTorch can resize as version 2 does.

    Raises:
        ConfigError: it is too old.
    """
    try:
        _resize(np.zeros((16, 16, 3), np.uint8), 8, "lanczos", flip=False)
    except (NotImplementedError, ValueError):
        raise ConfigError(
            "--pixel-version",
            2,
            f"1 with PyTorch {torch.__version__}, which has no Lanczos resizing",
            "Or upgrade PyTorch.",
        ) from None


def make_fast_views(
    raw: bytes,
    *,
    views: int,
    image_size: int,
    token_size: int,
    augment: Augment,
    seed: int,
    sample_id: int,
    decoder: Decoder = "pillow",
    crop_area: float = CROP_AREA[0],
) -> list[View]:
    """All views of an image, a pure function of the arguments; see :func:`beit_dist.images.decoding.make_view`.

    Raises:
        ImageRejectedError, MemoryError: as :func:`beit_dist.images.decoding.decode`.
    """

    @functools.cache
    def boxes(width: int, height: int) -> list[Box]:
        if augment == "center":
            return [centred_square(width, height)] * views
        return [crop_box(width, height, seed, (sample_id, view), crop_area) for view in range(views)]

    picture = decode_picture(raw, lambda *size: _scale(boxes(*size), image_size), decoder)
    pixels = picture.pixels
    made = []
    for view, drawn in enumerate(boxes(picture.width, picture.height)):
        (left, top, right, bottom), box = _on_the_grid(drawn, picture)
        crop, flip, key = pixels[top:bottom, left:right], False, (sample_id, view)
        if augment == "random":
            crop, flip = _jittered(crop, pixels, seed, key), flips(seed, key)
        crop = np.require(crop, requirements="W")  # or PyTorch warns
        image = _resize(crop, image_size, "bicubic", flip)
        made.append(View(image, _resize(crop, token_size, "lanczos", flip), box, flip))
    return made


def _scale(boxes: list[Box], image_size: int) -> int:
    shortest = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
    return next((scale for scale in SCALES if shortest >= _LEFT * image_size * scale), 1)


def _on_the_grid(box: Box, picture: Picture) -> tuple[Box, Box]:
    """The box in the picture's pixels, which may have been shrunk; and what that is in those of the file."""
    scale, width, height = picture.scale, picture.width, picture.height
    left, top, right, bottom = (round(edge / scale) for edge in box)
    in_file = (left * scale, top * scale, min(right * scale, width), min(bottom * scale, height))
    return (left, top, right, bottom), in_file


def _jittered(crop: Pixels, whole: Pixels, seed: int, key: tuple[int, int]) -> Pixels:
    """The jitter of :func:`beit_dist.images.decoding.make_view` on the crop alone."""
    jitter = jitter_of(seed, key)
    contrast = jitter.order.index("contrast")
    grey = _mean_grey(whole, [(name, jitter.factor(name)) for name in jitter.order[:contrast]])
    table = None
    for name in jitter.order:
        factor = jitter.factor(name)
        if name == "saturation":
            crop, table = _saturated(_looked_up(crop, table), factor), None
        else:
            towards = grey if name == "contrast" else 0
            table = _blended(towards, factor) if table is None else table.translate(_blended(towards, factor))
    return _looked_up(crop, table)


def _mean_grey(whole: Pixels, before: list[tuple[str, float]]) -> int:
    """The mean luminance of the image after the operations ``before`` contrast."""
    some = whole[:: max(1, whole.shape[0] * whole.shape[1] // _GREY_PIXELS)]
    for name, factor in before:
        some = _saturated(some, factor) if name == "saturation" else _looked_up(some, _blended(0, factor))
    return int(np.asarray(Image.fromarray(some).convert("L")).mean() + 0.5)


def _blended(towards: int, factor: float) -> bytes:
    """What Pillow's blend makes of each of 256 values: ``towards + factor · (value - towards)``."""
    table: bytes = Image.blend(Image.new("L", _RAMP.size, towards), _RAMP, factor).tobytes()
    return table


def _looked_up(pixels: Pixels, table: bytes | None) -> Pixels:
    if table is None:
        return pixels
    return np.frombuffer(bytearray(pixels.tobytes()).translate(table), np.uint8).reshape(pixels.shape)


def _saturated(pixels: Pixels, factor: float) -> Pixels:
    return np.asarray(ImageEnhance.Color(Image.fromarray(pixels)).enhance(factor))


def _resize(crop: Pixels, side: int, mode: str, flip: bool) -> Pixels:
    tensor = torch.from_numpy(crop).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(side, side), mode=mode, antialias=True)
    if flip:
        resized = resized.flip(-1)
    made: Pixels = np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
    return made
