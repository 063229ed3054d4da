"""A small ray caster: ellipsoids, frusta and convex solids on a lit ground, in NumPy.

It traces rays only inside the window of the picture that a solid's bounding sphere projects to, which makes
a scene of twenty solids a matter of milliseconds. The world is in metres: x to the right, y up, z away from
the viewer; the ground is y = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Vector = tuple[float, float, float]
Axes = tuple[Floats, Floats, Floats]
"""Points or directions as three arrays of one shape."""
Paint = Callable[[Floats, Floats], Floats]
"""Colours ``(n, 3)`` in linear [0, 1] of surface points, given as local coordinates and normals ``(n, 3)``."""

_FAR = np.float32(1e9)


def vec(values: ArrayLike) -> Floats:
    """Numbers as a float32 array."""
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Light:
    """The sun and what the sky adds to it; colours are linear."""

    direction: Vector
    """Unit vector towards the sun."""
    sun: Vector
    sky: Vector
    haze: Vector
    """What distant things fade to."""
    fade: float
    """Distance in metres after which 63% of a colour is haze."""


@dataclass(frozen=True)
class Camera:
    """Stands at x = z = 0 and looks along z, a little down."""

    height: float
    pitch: float
    """Radians below the horizon."""
    spread: float
    """Half the picture's width, one metre away."""

    def rays(self, side: int) -> Axes:
        """Directions ``(side, side)`` of the picture's pixels; one unit of length is one metre of depth."""
        line = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * np.float32(self.spread)
        sin, cos = np.float32(np.sin(self.pitch)), np.float32(np.cos(self.pitch))
        up = -line[:, None]
        shape = (side, side)
        return (
            np.broadcast_to(line[None, :], shape),
            np.broadcast_to(up * cos - sin, shape),
            np.broadcast_to(up * sin + cos, shape),
        )

    def window(self, centre: Vector, radius: float, side: int) -> tuple[slice, slice] | None:
        """Rows and columns that a sphere covers, or None if it is out of the picture or too near."""
        sin, cos = np.sin(self.pitch), np.cos(self.pitch)
        x, y = centre[0], centre[1] - self.height
        depth, up = -y * sin + centre[2] * cos, y * cos + centre[2] * sin
        if depth <= radius * 1.02:
            return None
        slices = []
        for across in (-up, x):
            # Tangents from the eye to the circle of the given radius around (across, depth).
            root = radius * np.sqrt(max(0.0, across**2 + depth**2 - radius**2))
            low, high = ((across * depth + sign * root) / (depth**2 - radius**2) for sign in (-1, 1))
            start = int(max(0, np.floor((low / self.spread + 1) / 2 * side)))
            stop = int(min(side, np.ceil((high / self.spread + 1) / 2 * side)))
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        rows, columns = slices
        if (rows.stop - rows.start) * (columns.stop - columns.start) < 6:
            return None  # too small to be seen
        return rows, columns


class Solid(Protocol):
    """A shape that rays can hit."""

    @property
    def bounds(self) -> tuple[Vector, float]:
        """Centre and radius of a sphere around it."""

    def hit(self, origin: tuple[float | Floats, ...], ray: tuple[float | Floats, ...]) -> Floats:
        """Distance along each ray to the first point hit from outside; far above any real one for a miss."""

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        """Local coordinates and unit normals of points ``(n, 3)`` on the surface."""


@dataclass(frozen=True)
class Ellipsoid:
    """Axis-aligned; local coordinates lie on the unit sphere."""

    centre: Vector
    radii: Vector

    @property
    def bounds(self) -> tuple[Vector, float]:
        return self.centre, max(self.radii)

    def hit(self, origin: tuple[float | Floats, ...], ray: tuple[float | Floats, ...]) -> Floats:
        start = [(o - c) / r for o, c, r in zip(origin, self.centre, self.radii, strict=True)]
        step = [d / r for d, r in zip(ray, self.radii, strict=True)]
        a = _dot(step, step)
        b = _dot(start, step)
        root = b * b - a * (_dot(start, start) - 1)
        near = (-b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root > 0) & (near > 1e-3), near, _FAR)

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        radii = vec(self.radii)
        local = (points - vec(self.centre)) / radii
        return local, _unit(local / radii)


@dataclass(frozen=True)
class Frustum:
    """An upright round solid: a cylinder, a cone or what is between; local coordinates are metres from the
    middle of its base."""

    base: Vector
    height: float
    bottom: float
    top: float

    @property
    def bounds(self) -> tuple[Vector, float]:
        x, y, z = self.base
        return (x, y + self.height / 2, z), float(np.hypot(self.height / 2, max(self.bottom, self.top)))

    @property
    def _slope(self) -> float:
        return (self.top - self.bottom) / self.height

    def hit(self, origin: tuple[float | Floats, ...], ray: tuple[float | Floats, ...]) -> Floats:
        (ox, oy, oz), (dx, dy, dz) = (
            tuple(o - b for o, b in zip(origin, self.base, strict=True)),
            ray,
        )
        k = self._slope
        wide = self.bottom + k * oy
        a = dx * dx + dz * dz - k * k * dy * dy
        b = ox * dx + oz * dz - k * wide * dy
        root = b * b - a * (ox * ox + oz * oz - wide * wide)
        square = np.sqrt(np.maximum(root, 0))
        best: Floats = np.full(np.broadcast(root, dy).shape, _FAR, np.float32)
        for sign in (-1, 1):
            t = (-b + sign * square) / a
            y = oy + t * dy
            best = np.where((root > 0) & (t > 1e-3) & (y >= 0) & (y <= self.height) & (t < best), t, best)
        for level, radius in ((0.0, self.bottom), (self.height, self.top)):
            t = (level - oy) / dy
            inside = (ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= radius**2
            best = np.where(inside & (t > 1e-3) & (t < best), t, best)
        return best

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        local = points - vec(self.base)
        y = local[:, 1]
        normal = local.copy()
        normal[:, 1] = -self._slope * (self.bottom + self._slope * y)
        edge = 1e-3 * self.height
        normal[y > self.height - edge] = (0, 1, 0)
        normal[y < edge] = (0, -1, 0)
        return local, _unit(normal)


@dataclass(frozen=True)
class Convex:
    """The points on the inner side of all planes ``normal · (p - centre) <= offset``, turned about the
    vertical; local coordinates are metres from the centre, before turning."""

    centre: Vector
    normals: tuple[Vector, ...]
    offsets: tuple[float, ...]
    radius: float
    turn: float = 0.0

    @property
    def bounds(self) -> tuple[Vector, float]:
        return self.centre, self.radius

    def hit(self, origin: tuple[float | Floats, ...], ray: tuple[float | Floats, ...]) -> Floats:
        start = _turned([o - c for o, c in zip(origin, self.centre, strict=True)], -self.turn)
        step = _turned(list(ray), -self.turn)
        enter: float | Floats = np.float32(1e-3)
        leave: float | Floats = _FAR
        for normal, offset in zip(self.normals, self.offsets, strict=True):
            slope = _dot(normal, step)
            t = (offset - _dot(normal, start)) / np.where(slope == 0, np.float32(1e-9), slope)
            enter = np.where(slope < 0, np.maximum(enter, t), enter)
            leave = np.where(slope < 0, leave, np.minimum(leave, t))
        return np.where((enter < leave) & (np.asarray(enter) > 2e-3), enter, _FAR).astype(np.float32)

    def surface(self, points: Floats) -> tuple[Floats, Floats]:
        moved = points - vec(self.centre)
        local = np.stack(_turned([moved[:, 0], moved[:, 1], moved[:, 2]], -self.turn), axis=1)
        planes = vec(self.normals)
        nearest = np.argmin(np.abs(local @ planes.T - vec(self.offsets)), axis=1)
        turned = np.stack(_turned([planes[:, 0], planes[:, 1], planes[:, 2]], self.turn), axis=1)
        return local, _unit(turned)[nearest]


@dataclass(frozen=True)
class Part:
    """A painted solid and the segmentation label it shows as."""

    solid: Solid
    paint: Paint
    label: int
    shine: float = 0.0


class Canvas:
    """A picture under construction: linear colour, depth and label of each pixel."""

    def __init__(self, camera: Camera, light: Light, side: int) -> None:
        self.camera, self.light, self.side = camera, light, side
        self.rays = camera.rays(side)
        self.colour = np.zeros((side, side, 3), np.float32)
        self.depth = np.full((side, side), _FAR, np.float32)
        self.label = np.zeros((side, side), np.uint8)

    def ground(self, paint: Paint, label: int, parts: list[Part]) -> None:
        """Fill what lies below the horizon, in the shadow of ``parts``."""
        dx, dy, dz = self.rays
        first = int(np.searchsorted(-dy[:, 0], 1e-3))  # the first row that looks down
        if first == self.side:
            return
        depth = -self.camera.height / dy[first:, :1]
        points = np.stack([dx[first:] * depth, np.zeros_like(dx[first:]), dz[first:] * depth], axis=-1)
        lit = np.ones(points.shape[:2], np.float32)
        for part in parts:
            self._shade_ground(lit, points, first, part.solid)
        flat = points.reshape(-1, 3)
        up = np.broadcast_to(vec((0, 1, 0)), flat.shape)
        shaded = self._lit(paint(flat, up), up, np.repeat(depth[:, 0], self.side), lit.reshape(-1))
        self.colour[first:] = shaded.reshape(points.shape)
        self.depth[first:] = depth
        self.label[first:] = label

    def draw(self, part: Part) -> None:
        """Draw a part where it is nearer than what is there."""
        window = self.camera.window(*part.solid.bounds, self.side)
        if window is None:
            return
        ray = [axis[window] for axis in self.rays]
        t = part.solid.hit((0.0, self.camera.height, 0.0), tuple(ray))
        rows, columns = np.nonzero(t < self.depth[window])
        if rows.size == 0:
            return
        t = t[rows, columns]
        points = np.stack([axis[rows, columns] * t for axis in ray], axis=1)
        points[:, 1] += self.camera.height
        local, normals = part.solid.surface(points)
        # Contact: what is close to the ground sees less of the sky.
        open_sky = np.float32(0.55) + np.float32(0.45) * np.clip(points[:, 1] / 0.4, 0, 1)
        colour = self._lit(part.paint(local, normals), normals, t, open_sky, part.shine, points)
        rows, columns = rows + window[0].start, columns + window[1].start
        self.colour[rows, columns] = colour
        self.depth[rows, columns] = t
        self.label[rows, columns] = part.label

    def _shade_ground(self, lit: Floats, points: Floats, first: int, solid: Solid) -> None:
        centre, radius = solid.bounds
        sun = self.light.direction
        slide = centre[1] / sun[1]
        below = (centre[0] - sun[0] * slide, 0.0, centre[2] - sun[2] * slide)
        window = self.camera.window(below, radius / sun[1], self.side)
        if window is None or window[0].stop <= first:
            return
        rows = slice(max(0, window[0].start - first), window[0].stop - first)
        spot = points[rows, window[1]]
        dark = solid.hit((spot[..., 0], 0.0, spot[..., 2]), sun) < _FAR
        lit[rows, window[1]] *= np.where(dark, np.float32(0.45), np.float32(1))

    def _lit(
        self,
        albedo: Floats,
        normals: Floats,
        depth: Floats,
        visible: Floats,
        shine: float = 0.0,
        points: Floats | None = None,
    ) -> Floats:
        light, sun = self.light, vec(self.light.direction)
        facing = np.maximum(normals @ sun, 0) * visible
        sky = (0.6 + 0.4 * normals[:, 1]) * (0.4 + 0.6 * visible)
        colour = albedo * (facing[:, None] * vec(light.sun) + sky[:, None] * vec(light.sky))
        if shine and points is not None:
            view = _unit(vec((0, self.camera.height, 0)) - points)
            glint = np.maximum(np.sum(_unit(view + sun) * normals, axis=1), 0) ** 40
            colour += (shine * glint)[:, None] * vec(light.sun)
        far = (1 - np.exp(-depth / np.float32(light.fade)))[:, None]
        return np.asarray(colour + (vec(light.haze) - colour) * far, np.float32)


def _dot(a: object, b: object) -> Floats:
    (ax, ay, az), (bx, by, bz) = a, b  # type: ignore[misc]
    return ax * bx + ay * by + az * bz  # type: ignore[has-type,no-any-return]


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.sqrt(np.sum(vectors * vectors, axis=-1, keepdims=True) + 1e-12), np.float32)


def _turned(vector: list[float | Floats], angle: float) -> list[float | Floats]:
    x, y, z = vector
    sin, cos = float(np.sin(angle)), float(np.cos(angle))
    return [x * cos + z * sin, y, z * cos - x * sin]
