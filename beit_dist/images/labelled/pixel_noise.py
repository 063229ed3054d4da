"""Changes of colours and pixels that are drawn for one image: jitter, photometric distortion, random erasing."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance

from beit_dist.draws import Purpose, Words, below, uniforms, words
from beit_dist.images.decoding import Pixels

JITTER_WORDS = 6
PHOTOMETRIC_WORDS = 9
_ATTEMPTS = 10
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
"""Of timm's ``RandomErasing``, whose defaults unilm uses (arXiv 1708.04896 has areas up to 0.4)."""
_BRIGHTNESS, _FACTOR, _HUE = 32, (0.5, 1.5), 36
"""mmseg's ``PhotoMetricDistortion``: grey levels, factors, degrees (18 of OpenCV's halves)."""


def colour_jitter(image: Image.Image, strength: float, drawn: Words) -> Image.Image:
    """Brightness, contrast and saturation by factors in 1 ± ``strength``, in random order (torchvision's)."""
    factors = [1 + strength * (2 * draw - 1) for draw in uniforms(drawn[:3]).tolist()]
    for number in np.argsort(drawn[3:JITTER_WORDS], kind="stable").tolist():
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
        image = kind(image).enhance(factors[number])
    return image


def photometric(pixels: Pixels, drawn: Words) -> Pixels:
    """Brightness, contrast, saturation and hue, each with probability 1/2; contrast comes second or last."""
    draws = uniforms(drawn[:PHOTOMETRIC_WORDS]).tolist()
    low, high = _FACTOR
    (bright, contrast, saturate, turn), amounts, late = [u < 0.5 for u in draws[:4]], draws[4:8], draws[8] < 0.5
    factor = low + (high - low) * amounts[1] if contrast else 1.0
    if bright:
        pixels = _linear(pixels, 1.0, _BRIGHTNESS * (2 * amounts[0] - 1))
    if not late:
        pixels = _linear(pixels, factor, 0.0)
    if saturate or turn:
        hsv = np.array(Image.fromarray(pixels).convert("HSV"))
        if saturate:
            hsv[..., 1] = _linear(hsv[..., 1], low + (high - low) * amounts[2], 0.0)
        if turn:
            hsv[..., 0] += np.uint8(round(256 * _HUE / 360 * (2 * amounts[3] - 1)) % 256)
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return _linear(pixels, factor, 0.0) if late else pixels


def _linear(pixels: Pixels, factor: float, offset: float) -> Pixels:
    if factor == 1 and offset == 0:
        return pixels
    table = np.clip(np.rint(np.arange(256) * factor + offset), 0, 255).astype(np.uint8)
    changed: Pixels = table[pixels]
    return changed


def erase(
    pixels: Pixels,
    probability: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
    key: tuple[int, int],
) -> Pixels:
    """With this probability, noise in place of a rectangle.

    As in timm, the noise is normal in normalised pixels; what lies outside 0 to 255 is cut off.

    Args:
        pixels: uint8 (H, W, 3).
        mean, std: of the normalisation, on a scale of 0 to 1.
        key: epoch and sample.
    """
    raw = words(seed, Purpose.ERASING, (*key, 0), 1 + 4 * _ATTEMPTS)
    if uniforms(raw[:1])[0] >= probability:
        return pixels
    height, width, _ = pixels.shape
    log_low, log_high = map(math.log, _ERASED_RATIO)
    for drawn in raw[1:].reshape(_ATTEMPTS, 4):
        share, ratio = uniforms(drawn[:2]).tolist()
        area = (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * share) * height * width
        ratio = math.exp(log_low + (log_high - log_low) * ratio)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = below(int(drawn[2]), height - h + 1), below(int(drawn[3]), width - w + 1)
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = _noise((h, w, 3), mean, std, seed, key)
            break
    return pixels


def _noise(
    shape: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int,
    key: tuple[int, int],
) -> Pixels:
    """Normal by Box and Muller's formulas, which make two numbers of two."""
    count = math.prod(shape)
    first, second = uniforms(words(seed, Purpose.ERASING, (*key, 1), count + count % 2)).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
    levels = np.rint(255 * (np.array(mean) + np.array(std) * normal))
    return np.asarray(np.clip(levels, 0, 255), np.uint8)
