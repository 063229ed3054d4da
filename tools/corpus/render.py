"""Draws lit solids on a picture: balls, cones and flat faces, each as an outline with the normals of its solid.

The world is in metres: x to the right, y up, z away from the viewer; the ground is y = 0. What is drawn covers
what is there, so a scene is drawn from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Vector = tuple[float, float, float]
Colour = tuple[float, float, float]
"""Linear, in [0, 1]."""
Paint = Callable[[Floats], Floats]
"""Colours ``(n, 3)`` of points ``(n, 3)`` of a surface; where their zero is, each solid says."""


def vec(values: ArrayLike) -> Floats:
    """Numbers as a float32 array."""
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Light:
    """The sun and what the sky adds to it; colours are linear."""

    direction: Vector
    """Unit vector towards the sun."""
    sun: Colour
    sky: Colour
    haze: Colour
    """What distant things fade to."""
    fade: float
    """Distance in metres after which 63% of a colour is haze."""

    def on(self, colours: Floats, normals: Floats, depth: ArrayLike, visible: Floats, shine: float) -> Floats:
        """Surfaces of these colours and unit normals ``(n, 3)`` as they look from ``depth`` metres away.

        Args:
            visible: share of the sun and of the sky that reaches each, in [0, 1].
            shine: brightness of the sun's reflection.
        """
        sun = vec(self.direction)
        facing = np.maximum(normals @ sun, 0) * visible
        sky = (0.6 + 0.4 * normals[:, 1]) * (0.4 + 0.6 * visible)
        lit = colours * (facing[:, None] * vec(self.sun) + sky[:, None] * vec(self.sky))
        if shine:
            halfway = (sun + vec((0, 0, -1))) / np.linalg.norm(sun + vec((0, 0, -1)))
            lit += shine * np.maximum(normals @ halfway, 0)[:, None] ** 40 * vec(self.sun)
        haze = 1 - np.exp(-vec(depth) / np.float32(self.fade))[..., None]
        return np.asarray(lit + (vec(self.haze) - lit) * haze, np.float32)


class Canvas:
    """A square picture under construction: linear colour ``(side, side, 3)`` and label ``(side, side)``.

    Args:
        spread: half the picture's width, one metre away.
        horizon: its row, as a share of the side.
        height: of the viewer, in metres.
    """

    def __init__(self, side: int, spread: float, horizon: float, height: float, light: Light) -> None:
        self.side, self.light, self.height = side, light, height
        self.focal = side / (2 * spread)
        self.across = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / self.focal
        """Of each column, metres to the right at one metre's distance."""
        self.up = (side * horizon - np.arange(side, dtype=np.float32) - 0.5) / self.focal
        """Of each row, metres above the viewer at one metre's distance."""
        self.colour = np.zeros((side, side, 3), np.float32)
        self.label = np.zeros((side, side), np.uint8)

    def ground(self, paint: Paint, label: int, shadows: Callable[[Floats], Floats]) -> None:
        """Fill what lies below the horizon; ``shadows`` gives the share of light at points ``(n, 3)``."""
        below = self.up < -1e-3
        depth = np.repeat(-self.height / self.up[below], self.side)
        points = np.stack([np.tile(self.across, below.sum()) * depth, 0 * depth, depth], axis=1)
        up = np.broadcast_to(vec((0, 1, 0)), points.shape)
        lit = self.light.on(paint(points), up, depth, shadows(points), 0)
        self.colour[below] = lit.reshape(-1, self.side, 3)
        self.label[below] = label


@dataclass(frozen=True)
class Place:
    """Where a thing stands, how big it is, and the colours of leaves in this picture's season."""

    x: float
    z: float
    size: float
    leaves: tuple[Colour, Colour]
    label: int


class Brush:
    """Draws the parts of a thing, in sizes from its foot: x to the right, y up, z away."""

    def __init__(self, canvas: Canvas, place: Place) -> None:
        self._canvas, self.place = canvas, place
        self._x = (canvas.across * place.z - place.x) / place.size
        self._y = (canvas.up * place.z + canvas.height) / place.size
        self._tilt = canvas.height / place.z  # what lies one farther appears so much higher

    def ball(self, at: Vector, radii: Vector, paint: Paint, shine: float = 0) -> None:
        """An ellipsoid; painted by points of the unit sphere."""
        x, y = self._seen(at)
        window, across, up = self._window((x - radii[0], x + radii[0]), (y - radii[1], y + radii[1]))
        u, v = (across - x) / radii[0], (up - y) / radii[1]
        inside = u * u + v * v < 1
        points = _stack(u, v, -np.sqrt(np.maximum(1 - u * u - v * v, 0)))
        self._put(window, inside, points, points, paint, shine)

    def cone(self, at: Vector, height: float, bottom: float, top: float, paint: Paint) -> None:
        """An upright cone, cylinder or what is between; painted by points from the middle of its base."""
        (x, y), wide, tilt = self._seen(at), max(bottom, top), self._tilt
        window, across, up = self._window((x - wide, x + wide), (y - tilt * wide, y + height + tilt * wide))
        u, v = across - x, up - y
        radius = np.maximum(bottom + (top - bottom) * np.clip(v / height, 0, 1), 1e-4)
        near = np.sqrt(np.maximum(1 - (u / radius) ** 2, 0))
        level = v + tilt * radius * near  # the near side of a level circle is seen below its middle
        lid = (u / max(top, 1e-4)) ** 2 + ((v - height) / max(tilt * top, 1e-4)) ** 2 < 1
        inside = (np.abs(u) < radius) & (level > 0) & (level < height) | lid
        normals = np.where(lid[..., None], vec((0, 1, 0)), _stack(u / radius, (bottom - top) / height, -near))
        self._put(window, inside, normals, _stack(u, np.minimum(level, height), -near * radius), paint)

    def face(self, corner: Vector, right: Vector, up: Vector, paint: Paint, triangle: bool = False) -> None:
        """A parallelogram or a triangle, unless it is seen from behind; painted by lengths along both edges."""
        normal = np.cross(up, right)
        if normal[1] * self._tilt <= normal[2]:
            return
        (x, y), (ax, ay), (bx, by) = self._seen(corner), self._seen(right), self._seen(up)
        corners = np.array([(x, y), (x + ax, y + ay), (x + bx, y + by), (x + ax + bx, y + ay + by)])
        window, u, v = self._window(*np.stack([corners.min(0), corners.max(0)], axis=1))
        area = ax * by - ay * bx
        s, t = ((u - x) * by - (v - y) * bx) / area, ((v - y) * ax - (u - x) * ay) / area
        inside = (s >= 0) & (t >= 0) & (s + t <= 1 if triangle else (s <= 1) & (t <= 1))
        points = _stack(s * math.hypot(*right), t * math.hypot(*up), 0)
        self._put(window, inside, np.broadcast_to(vec(normal), points.shape), points, paint)

    def _seen(self, point: Vector) -> tuple[float, float]:
        return point[0], point[1] + self._tilt * point[2]

    def _window(self, x: ArrayLike, y: ArrayLike) -> tuple[tuple[slice, slice], Floats, Floats]:
        """Rows and columns of a rectangle, and where their pixels are, ``(1, columns)`` and ``(rows, 1)``."""
        columns = slice(*np.searchsorted(self._x, x))
        rows = slice(*np.searchsorted(-self._y, -np.flip(y)))
        return (rows, columns), self._x[None, columns], self._y[rows, None]

    def _put(
        self,
        window: tuple[slice, slice],
        inside: NDArray[np.bool_],
        normals: Floats,
        points: Floats,
        paint: Paint,
        shine: float = 0,
    ) -> None:
        normals = normals[inside]
        normals /= np.sqrt(np.einsum("ij,ij->i", normals, normals))[:, None]
        height = np.broadcast_to(self._y[window[0], None], inside.shape)[inside] * self.place.size
        visible = vec(0.55 + 0.45 * np.clip(height / 0.4, 0, 1))  # near the ground, less of the sky is seen
        colours = self._canvas.light.on(paint(points[inside]), normals, self.place.z, visible, shine)
        self._canvas.colour[window][inside] = colours
        self._canvas.label[window][inside] = self.place.label


def _stack(*parts: ArrayLike) -> Floats:
    return np.stack(np.broadcast_arrays(*parts), axis=-1)
