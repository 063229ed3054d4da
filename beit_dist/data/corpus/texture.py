"""Paints for solids and ground: colour as a function of place, from tileable noise and simple patterns."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from beit_dist.data.corpus.render import Floats, Paint, vec
from beit_dist.data.draws import Purpose, uniforms, words

Colour = tuple[float, float, float]

_SIDE = 512


@cache
def noise(roughness: float = 1.0) -> Floats:
    """Tileable noise ``(512, 512)`` in [0, 1] whose spectrum falls with frequency to the power ``roughness``."""
    phases = uniforms(words(0, Purpose.CORPUS, (0, 1), _SIDE * _SIDE)).reshape(_SIDE, _SIDE) * 2 * np.pi
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.fftfreq(_SIDE))) * _SIDE
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1) ** -(roughness + 0.5), 0)
    field = np.fft.ifft2(amplitude * np.exp(1j * phases)).real
    low, high = np.quantile(field, [0.01, 0.99])
    return vec(np.clip((field - low) / (high - low), 0, 1))


def sample(field: Floats, u: NDArray[np.floating], v: NDArray[np.floating]) -> Floats:
    """The field's values at ``(u, v)``, in pixels of the field, which repeats."""
    columns = np.floor(u).astype(np.int32) & (_SIDE - 1)
    rows = np.floor(v).astype(np.int32) & (_SIDE - 1)
    return np.asarray(field[rows, columns], np.float32)


def mix(a: Colour | Floats, b: Colour | Floats, share: NDArray[np.floating]) -> Floats:
    """``a`` where ``share`` is 0, ``b`` where it is 1."""
    first, second = vec(a), vec(b)
    return np.asarray(first + (second - first) * share[:, None], np.float32)


def plain(colour: Colour, grain: float = 0.12, shift: float = 0.0) -> Paint:
    """One colour, a little uneven."""

    def paint(local: Floats, normals: Floats) -> Floats:
        uneven = sample(noise(0.8), local[:, 0] * 90 + local[:, 2] * 70 + shift, local[:, 1] * 90 + shift)
        return np.asarray(vec(colour) * (1 + grain * (2 * uneven[:, None] - 1)), np.float32)

    return paint


def mottled(a: Colour, b: Colour, scale: float, shift: float) -> Paint:
    """Two colours mixed by noise, as leaves or stone are."""

    def paint(local: Floats, normals: Floats) -> Floats:
        share = sample(noise(0.6), local[:, 0] * scale + shift, (local[:, 1] + local[:, 2] * 0.7) * scale)
        return mix(a, b, share)

    return paint


def stripes(a: Colour, b: Colour, count: float, axis: int) -> Paint:
    """Bands of two colours along a local axis."""

    def paint(local: Floats, normals: Floats) -> Floats:
        return mix(a, b, (np.sin(local[:, axis] * count * np.float32(np.pi)) > 0).astype(np.float32))

    return paint


def gores(colours: list[Colour], count: int) -> Paint:
    """Segments around the vertical, as on a beach ball or a balloon."""
    table = vec(colours)

    def paint(local: Floats, normals: Floats) -> Floats:
        angle = (np.arctan2(local[:, 2], local[:, 0]) / (2 * np.pi) + 0.5) * count
        return np.asarray(table[angle.astype(np.int32) % len(colours)], np.float32)

    return paint


def dots(a: Colour, b: Colour, count: float) -> Paint:
    """Round spots of ``b`` on ``a``."""

    def paint(local: Floats, normals: Floats) -> Floats:
        u = np.arctan2(local[:, 2], local[:, 0]) * count / np.float32(np.pi)
        v = local[:, 1] * count
        u = u + 0.5 * (np.floor(v) % 2)
        distance = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
        return mix(a, b, (distance < 0.3).astype(np.float32))

    return paint


def bricks(a: Colour, mortar: Colour, size: float) -> Paint:
    """Rows of bricks on upright walls, each with a shade of its own."""

    def paint(local: Floats, normals: Floats) -> Floats:
        row = np.floor(local[:, 1] / size)
        u = (local[:, 0] + local[:, 2]) / (2 * size) + 0.5 * (row % 2)
        joint = (local[:, 1] / size - row < 0.16) | (u - np.floor(u) < 0.08)
        shade = 0.8 + 0.4 * sample(noise(0.3), np.floor(u) * 37, row * 53)
        return mix(vec(a) * shade[:, None], mortar, joint.astype(np.float32))

    return paint


def windows(wall: Paint, glass: Colour, size: float, low: float, door: Colour | None = None) -> Paint:
    """A wall with a row of windows every ``size`` metres above ``low`` and, if wanted, a door in front."""

    def paint(local: Floats, normals: Floats) -> Floats:
        colours = wall(local, normals)
        across = np.where(np.abs(normals[:, 1]) < 0.3, local[:, 0] + local[:, 2], 9e3)
        u, v = np.abs((across / size) % 1 - 0.5), np.abs(((local[:, 1] - low) / size) % 1 - 0.5)
        pane = (u < 0.22) & (v < 0.24) & (local[:, 1] > low) & (across < 9e3)
        colours[pane] = glass
        return colours

    def with_door(local: Floats, normals: Floats) -> Floats:
        colours = paint(local, normals)
        opening = (np.abs(local[:, 0]) < size * 0.22) & (local[:, 1] < low + size * 0.25)
        colours[opening & (np.abs(normals[:, 1]) < 0.3)] = door
        return colours

    return paint if door is None else with_door


def meadow(a: Colour, b: Colour, flower: Colour, density: float, shift: float) -> Paint:
    """Ground of two tones with sparse specks; detail fades where it is too far to be seen."""

    def paint(local: Floats, normals: Floats) -> Floats:
        x, z = local[:, 0], local[:, 2]
        near = np.clip(4 / z, 0, 1)
        fine = sample(noise(0.2), x * 55 + shift, z * 40)
        broad = sample(noise(1.2), x * 12 + shift, z * 9 + shift)
        colours = mix(a, b, np.clip(broad + (fine - 0.5) * near, 0, 1))
        if density:
            specks = (fine > 1 - density) & (z < 9)
            colours[specks] = flower
        return colours

    return paint


def tiles(a: Colour, b: Colour, size: float, turn: float) -> Paint:
    """A chequered floor whose contrast fades with distance."""
    sin, cos = np.float32(np.sin(turn)), np.float32(np.cos(turn))

    def paint(local: Floats, normals: Floats) -> Floats:
        u = (local[:, 0] * cos + local[:, 2] * sin) / size
        v = (local[:, 2] * cos - local[:, 0] * sin) / size
        odd = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
        clear = np.exp(-np.maximum(local[:, 2], 0) / (14 * size))
        grain = sample(noise(0.7), local[:, 0] * 60, local[:, 2] * 60)
        share = 0.5 + (odd - 0.5) * clear + 0.12 * (grain - 0.5)
        return mix(a, b, share.astype(np.float32))

    return paint


def waves(a: Colour, b: Colour, shift: float) -> Paint:
    """Water: long ripples, calmer far away."""

    def paint(local: Floats, normals: Floats) -> Floats:
        x, z = local[:, 0], local[:, 2]
        bend = sample(noise(1.5), x * 8 + shift, z * 8)
        ripple = np.sin(z * 14 / (1 + z * 0.12) + 9 * bend + x) * 0.5 + 0.5
        return mix(a, b, (ripple * np.clip(5 / z, 0.15, 0.8)).astype(np.float32))

    return paint
