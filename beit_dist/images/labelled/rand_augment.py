"""RandAugment as timm has it for ``rand-m9-mstd0.5-inc1``: which operation of Pillow, and how strong.

The operations, their ranges and their order are those of timm 1.0 (``data/auto_augment.py``,
``_RAND_INCREASING_TRANSFORMS``). The draws are ours, keyed, and the pixels are Pillow's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageOps

from beit_dist.config.labelled import RandAugmentConfig
from beit_dist.draws import Words, below, uniforms

Colour = tuple[int, int, int]
Operation = Callable[[Image.Image, float, Image.Resampling, Colour], Image.Image]
"""From image, level in [-1, 1], filter and colour of what comes in from outside."""

WORDS = 5
"""Of one layer."""
_STRONGEST = 10.0
_APPLIED = 0.5
_TRANSLATION = 0.45
_ROTATION = 30.0
_SHEAR = 0.3
_ENHANCEMENT, _LEAST = 0.9, 0.1
_THRESHOLD = 128


def rand_augment(
    image: Image.Image, settings: RandAugmentConfig, drawn: Words, resample: Image.Resampling, fill: Colour
) -> Image.Image:
    """Apply ``settings.layers`` operations.

    Args:
        drawn: ``layers · WORDS`` words.
        resample: filter of what turns and shifts.
        fill: colour of what comes in from outside.
    """
    for layer in drawn.reshape(settings.layers, WORDS):
        applied, sign, first, second = uniforms(layer[1:]).tolist()
        if applied >= _APPLIED:
            continue
        normal = math.sqrt(-2 * math.log1p(-first)) * math.cos(2 * math.pi * second)
        strength = min(_STRONGEST, max(0.0, settings.magnitude + settings.std * normal)) / _STRONGEST
        operation = OPERATIONS[below(int(layer[0]), len(OPERATIONS))]
        image = operation(image, -strength if sign < 0.5 else strength, resample, fill)
    return image


def _auto_contrast(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return image.rotate(_ROTATION * level, resample=resample, fillcolor=fill)


def _posterize(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    bits = 4 - int(4 * abs(level))
    # timm asks for 0 bits at full strength, which gave black, and which Pillow refuses since version 12.
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def _solarize(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return ImageOps.solarize(image, 256 - min(256, int(256 * abs(level))))


def _solarize_add(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    added = min(128, int(110 * abs(level)))
    return image.point([min(255, value + added) if value < _THRESHOLD else value for value in range(256)] * 3)


def _enhancing(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def enhance(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
        return kind(image).enhance(max(_LEAST, 1 + _ENHANCEMENT * level))

    return enhance


def _shear_x(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return _affine(image, (1, _SHEAR * level, 0, 0, 1, 0), resample, fill)


def _shear_y(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, 0, _SHEAR * level, 1, 0), resample, fill)


def _translate_x(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, _TRANSLATION * level * image.width, 0, 1, 0), resample, fill)


def _translate_y(image: Image.Image, level: float, resample: Image.Resampling, fill: Colour) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _TRANSLATION * level * image.height), resample, fill)


def _affine(
    image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling, fill: Colour
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)


OPERATIONS: tuple[Operation, ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhancing(ImageEnhance.Color),
    _enhancing(ImageEnhance.Contrast),
    _enhancing(ImageEnhance.Brightness),
    _enhancing(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
"""In timm's order."""
