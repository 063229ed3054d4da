"""Paints for solids and ground: colour as a function of place, from tileable noise and simple patterns."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corpus.render import Colour, Floats, Paint, vec

_SIDE = 512


@cache
def noise(roughness: float) -> Floats:
    """Tileable noise ``(512, 512)`` in [0, 1] whose spectrum falls with frequency to the power ``roughness``."""
    waves = np.fft.fft2(np.random.default_rng(0).standard_normal((_SIDE, _SIDE)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.fftfreq(_SIDE))) * _SIDE
    field = np.fft.ifft2(waves * np.where(frequency > 0, np.maximum(frequency, 1) ** -(roughness + 0.5), 0)).real
    low, high = np.quantile(field, [0.01, 0.99])
    return vec(np.clip((field - low) / (high - low), 0, 1))


def sample(roughness: float, u: NDArray[np.floating], v: NDArray[np.floating]) -> Floats:
    """The noise at ``(u, v)``, in pixels of the noise, which repeats."""
    rows, columns = (np.floor(where).astype(np.int32) % _SIDE for where in (v, u))
    return np.asarray(noise(roughness)[rows, columns], np.float32)


def mix(a: ArrayLike, b: ArrayLike, share: NDArray[np.generic]) -> Floats:
    """Colours: ``a`` where ``share`` is 0, ``b`` where it is 1."""
    return vec(a) + (vec(b) - vec(a)) * vec(share)[..., None]


def _around(points: Floats) -> Floats:
    """The angle about the vertical, in turns from 0 to 1."""
    return np.asarray(np.arctan2(points[:, 2], points[:, 0]) / (2 * np.pi) + 0.5, np.float32)


def plain(colour: Colour) -> Paint:
    """One colour, a little uneven."""
    return mottled(vec(colour) * 0.9, vec(colour) * 1.1, 90, 0)


def mottled(a: ArrayLike, b: ArrayLike, scale: float, shift: float) -> Paint:
    """Two colours mixed by noise, as leaves or stone are."""
    return lambda p: mix(a, b, sample(0.6, p[:, 0] * scale + shift, (p[:, 1] + p[:, 2] * 0.7) * scale))


def stripes(a: Colour, b: Colour, count: float) -> Paint:
    """Level bands of two colours."""
    return lambda p: mix(a, b, np.sin(p[:, 1] * count * np.pi) > 0)


def gores(colours: list[Colour], count: int) -> Paint:
    """Segments around the vertical, as on a beach ball or a balloon."""
    return lambda p: vec(colours)[(_around(p) * count).astype(np.int32) % len(colours)]


def dots(a: Colour, b: Colour, count: float) -> Paint:
    """Round spots of ``b`` on ``a``."""

    def paint(p: Floats) -> Floats:
        v = p[:, 1] * count
        u = _around(p) * 2 * count + 0.5 * (np.floor(v) % 2)
        return mix(a, b, np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3)

    return paint


def bricks(a: Colour, mortar: Colour, size: float) -> Paint:
    """Rows of bricks, each with a shade of its own."""

    def paint(p: Floats) -> Floats:
        row = np.floor(p[:, 1] / size)
        u = (p[:, 0] + p[:, 2]) / (2 * size) + 0.5 * (row % 2)
        shade = 0.8 + 0.4 * sample(0.3, np.floor(u) * 37, row * 53)
        return mix(vec(a) * shade[:, None], mortar, (p[:, 1] / size % 1 < 0.16) | (u % 1 < 0.08))

    return paint


def windows(wall: Paint, glass: Colour, size: float, low: float, door: Colour | None = None) -> Paint:
    """A wall with rows of windows every ``size`` above ``low`` and, if wanted, a door below the second."""

    def paint(p: Floats) -> Floats:
        colours, u, v = wall(p), (p[:, 0] + p[:, 2]) / size, (p[:, 1] - low) / size
        colours[(np.abs(u % 1 - 0.5) < 0.22) & (np.abs(v % 1 - 0.5) < 0.24) & (v > 0)] = glass
        if door is not None:
            colours[(np.abs(u - 1.5) < 0.25) & (v < 0.3)] = door
        return colours

    return paint


def meadow(a: Colour, b: Colour, flower: Colour, density: float, shift: float) -> Paint:
    """Ground of two tones with sparse specks; detail fades where it is too far to be seen."""

    def paint(p: Floats) -> Floats:
        x, z = p[:, 0], p[:, 2]
        fine, broad = sample(0.2, x * 55 + shift, z * 40), sample(1.2, x * 12 + shift, z * 9 + shift)
        colours = mix(a, b, np.clip(broad + (fine - 0.5) * np.clip(4 / z, 0, 1), 0, 1))
        colours[(fine > 1 - density) & (z < 9)] = flower
        return colours

    return paint


def tiles(a: Colour, b: Colour, size: float, turn: float) -> Paint:
    """A chequered floor whose contrast fades with distance."""

    def paint(p: Floats) -> Floats:
        x, z, sin, cos = p[:, 0], p[:, 2], np.sin(turn), np.cos(turn)
        odd = (np.floor((x * cos + z * sin) / size) + np.floor((z * cos - x * sin) / size)) % 2
        return mix(a, b, 0.44 + (odd - 0.5) * np.exp(-z / (14 * size)) + 0.12 * sample(0.7, x * 60, z * 60))

    return paint


def waves(a: ArrayLike, b: ArrayLike, shift: float) -> Paint:
    """Water: long ripples, calmer far away."""

    def paint(p: Floats) -> Floats:
        x, z = p[:, 0], p[:, 2]
        ripple = np.sin(z * 14 / (1 + z * 0.12) + 9 * sample(1.5, x * 8 + shift, z * 8) + x) * 0.5 + 0.5
        return mix(a, b, ripple * np.clip(5 / z, 0.15, 0.8))

    return paint
