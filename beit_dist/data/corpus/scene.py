"""A picture: weather, land and light that go together, one thing in front and others around it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit_dist.data.corpus import texture as t
from beit_dist.data.corpus.render import Camera, Canvas, Floats, Light, Paint, Part, Vector, vec
from beit_dist.data.corpus.texture import Colour
from beit_dist.data.corpus.things import HEIGHTS, THINGS, Dice, Place

LABELS = ("sky", "hills", "ground", *THINGS)
"""Names of the segmentation labels; a label map holds their positions in this tuple."""
SUPERSAMPLING = 1.5
"""Pixels are traced this much denser than the picture and averaged, which softens edges."""


@dataclass(frozen=True)
class Season:
    """Colours that belong together."""

    zenith: Colour
    horizon: Colour
    sun: Vector
    hills: Colour
    land: tuple[Colour, Colour]
    flower: Colour
    leaves: tuple[Colour, Colour]
    elevation: tuple[float, float]
    """Lowest and highest sun, in radians."""
    ground: tuple[str, ...]


_SUMMER_LEAVES: tuple[Colour, Colour] = ((0.06, 0.22, 0.04), (0.30, 0.48, 0.10))
SEASONS = (
    Season(
        (0.10, 0.30, 0.75), (0.62, 0.78, 0.92), (1.05, 0.98, 0.85), (0.16, 0.30, 0.22),
        ((0.12, 0.30, 0.06), (0.34, 0.46, 0.12)), (0.92, 0.85, 0.30), _SUMMER_LEAVES, (0.7, 1.1),
        ("meadow", "meadow", "tiles", "waves"),
    ),
    Season(
        (0.30, 0.38, 0.58), (0.92, 0.78, 0.58), (1.10, 0.86, 0.60), (0.34, 0.20, 0.16),
        ((0.36, 0.26, 0.08), (0.56, 0.38, 0.12)), (0.75, 0.25, 0.05),
        ((0.45, 0.12, 0.03), (0.85, 0.45, 0.06)), (0.45, 0.8), ("meadow", "meadow", "tiles"),
    ),
    Season(
        (0.42, 0.55, 0.75), (0.86, 0.89, 0.94), (0.90, 0.88, 0.86), (0.62, 0.68, 0.76),
        ((0.70, 0.76, 0.86), (0.90, 0.92, 0.96)), (0.95, 0.96, 1.0),
        ((0.35, 0.40, 0.40), (0.85, 0.88, 0.92)), (0.35, 0.7), ("meadow",),
    ),
    Season(
        (0.16, 0.40, 0.78), (0.92, 0.86, 0.72), (1.15, 1.02, 0.82), (0.62, 0.38, 0.22),
        ((0.68, 0.48, 0.26), (0.86, 0.68, 0.42)), (0.50, 0.34, 0.20),
        ((0.25, 0.34, 0.10), (0.50, 0.55, 0.22)), (0.8, 1.2), ("meadow", "meadow", "tiles"),
    ),
    Season(
        (0.14, 0.10, 0.34), (0.96, 0.48, 0.28), (1.15, 0.62, 0.36), (0.16, 0.09, 0.20),
        ((0.10, 0.14, 0.12), (0.26, 0.22, 0.18)), (0.95, 0.65, 0.55),
        ((0.07, 0.12, 0.08), (0.26, 0.26, 0.12)), (0.30, 0.5), ("meadow", "tiles", "waves"),
    ),
)  # fmt: skip


def draw_scene(seed: int, picture: int, kind: str, side: int) -> tuple[Image.Image, Image.Image]:
    """The RGB picture and its label map (mode P, see :data:`LABELS`), both ``side`` × ``side``.

    A function of its arguments alone. ``kind`` names the thing in front, one of ``THINGS``.
    """
    dice = Dice(seed, picture)
    season = dice.pick((SEASONS[0], *SEASONS))  # summer is the most common
    traced = round(side * SUPERSAMPLING)
    front = Place(0, 0, dice.between(0.85, 1.3), season.leaves, LABELS.index(kind))
    camera, front = _aim(front, HEIGHTS[kind] * front.size, dice)
    canvas = Canvas(camera, _light(season, dice), traced)
    _paint_sky(canvas, season, dice)
    parts = _place_things(kind, front, season, camera, dice)
    canvas.ground(_ground(season, dice), LABELS.index("ground"), parts)
    for part in parts:
        canvas.draw(part)
    colour = _displayed(canvas.colour * np.float32(dice.between(0.85, 1.1)))
    picture_image = Image.fromarray(colour, "RGB").resize((side, side), Image.Resampling.BOX)
    nearest = ((np.arange(side) + 0.5) * traced / side).astype(np.int64)
    labels = Image.fromarray(canvas.label[np.ix_(nearest, nearest)], "P")
    labels.putpalette(_palette())
    return picture_image, labels


def _light(season: Season, dice: Dice) -> Light:
    elevation, azimuth = dice.between(*season.elevation), dice.between(-2.4, 2.4)
    flat = math.cos(elevation)
    # Azimuth 0 is behind the viewer, who then sees the lit side of things.
    direction = (flat * math.sin(azimuth), math.sin(elevation), -flat * math.cos(azimuth))
    zenith, horizon = season.zenith, season.horizon
    sky = tuple(0.22 + 0.25 * (0.5 * z + 0.5 * h) for z, h in zip(zenith, horizon, strict=True))
    return Light(direction, season.sun, (sky[0], sky[1], sky[2]), horizon, dice.between(35, 120))


def _paint_sky(canvas: Canvas, season: Season, dice: Dice) -> None:
    """Sky, clouds and two ranges of hills: everything without distance."""
    dx, dy, dz = (axis.reshape(-1) for axis in canvas.rays)
    above = np.maximum(dy, 0) / np.hypot(dx, dz)
    colours = t.mix(season.horizon, season.zenith, 1 - np.exp(-above / np.float32(0.28)))
    density, shift = dice.between(-0.1, 0.75), dice.between(0, 500)
    if density > 0:
        flat = 1 / (above + np.float32(0.12))
        cloud = t.sample(t.noise(1.3), dx * flat * 34 + shift, flat * 34 + shift)
        share = np.clip((cloud - (1 - density)) * 3, 0, 0.9) * np.clip(above * 12, 0, 1)
        colours = t.mix(colours, dice.near((0.95, 0.94, 0.95), 0.06), share)
    label = np.zeros(dx.shape, np.uint8)
    for layer in range(2):
        height = dice.between(0.05, 0.34) * (1.2 - 0.6 * layer)
        shift, span = dice.between(0, 500), dice.between(60, 160) * (1 + layer)
        # One outline for each column of the picture: hills have no depth to look around.
        column = canvas.rays[0][0] * np.float32(span) + np.float32(shift)
        low = t.noise(2.0)
        floor = np.floor(column)
        left, right = t.sample(low, floor, column * 0 + shift), t.sample(low, floor + 1, column * 0 + shift)
        outline = np.float32(height) * (left + (right - left) * (column - floor))
        inside = above.reshape(canvas.side, canvas.side) < outline[None, :]
        inside &= canvas.rays[1] > 0
        hidden = inside.reshape(-1)
        haze = np.float32(0.55 - 0.35 * layer)
        grain = t.sample(t.noise(0.7), dx[hidden] * 300 + shift, above[hidden] * 500)
        hill = t.mix(season.hills, season.horizon, np.clip(haze + 0.25 * (grain - 0.5), 0, 1))
        colours[hidden] = hill
        label[hidden] = LABELS.index("hills")
    canvas.colour[:] = colours.reshape(canvas.side, canvas.side, 3)
    canvas.label[:] = label.reshape(canvas.side, canvas.side)


def _ground(season: Season, dice: Dice) -> Paint:
    dark, bright = dice.near(season.land[0]), dice.near(season.land[1])
    kind, shift = dice.pick(season.ground), dice.between(0, 500)
    if kind == "tiles":
        stone = dice.near(dice.pick(((0.72, 0.68, 0.60), (0.62, 0.40, 0.28), (0.52, 0.56, 0.62))), 0.2)
        other = dice.near((stone[0] * 0.6, stone[1] * 0.6, stone[2] * 0.62))
        return t.tiles(stone, other, dice.between(0.4, 0.9), dice.between(0, 1.5))
    if kind == "waves":
        water = t.mix(season.zenith, (0.04, 0.20, 0.26), vec([0.5]))[0]
        crest = t.mix(tuple(water), season.horizon, vec([0.45]))[0]
        return t.waves(tuple(water), tuple(crest), shift)
    return t.meadow(dark, bright, season.flower, dice.pick((0.0, 0.02, 0.05)), shift)


def _aim(front: Place, tall: float, dice: Dice) -> tuple[Camera, Place]:
    """Step back until the thing in front fills the wanted share of the picture, and look at it."""
    spread, fill = dice.between(0.45, 0.62), dice.between(0.42, 0.85)
    depth = max(1.7, tall / (2 * spread * fill))
    height = dice.between(0.7, 1.9)
    pitch = math.atan((height - tall * dice.between(0.4, 0.75)) / depth)
    x = dice.between(-0.45, 0.45) * spread * depth
    camera = Camera(height, min(0.4, max(-0.08, pitch)), spread)
    return camera, replace(front, x=x, z=depth)


def _place_things(kind: str, front: Place, season: Season, camera: Camera, dice: Dice) -> list[Part]:
    """The parts of everything in the scene: ``kind`` in front, up to nine others behind it."""
    names = list(THINGS)
    parts = THINGS[kind](front, dice)
    taken = [(front.x, front.z, front.size)]
    # Woods and villages: a scene's other things are mostly of two kinds.
    around = [dice.pick(names), dice.pick(names)]
    for _ in range(int(dice.between(2, 10))):
        z = front.z + 0.7 + 9 * dice.between(0, 1) ** 1.5
        x, size = dice.between(-1.1, 1.1) * camera.spread * z, dice.between(0.7, 1.3)
        name = dice.pick(around) if dice.chance(0.75) else dice.pick(names)
        if all(math.hypot(x - a, z - b) > 0.5 * (size + c) for a, b, c in taken):
            taken.append((x, z, size))
            parts += THINGS[name](Place(x, z, size, season.leaves, LABELS.index(name)), dice)
    return parts


def _displayed(linear: Floats) -> NDArray[np.uint8]:
    """Linear light to sRGB bytes, with a soft shoulder in place of clipped highlights."""
    bright = np.maximum(linear, 0)
    toned = bright / (1 + np.maximum(bright - 0.6, 0) * 0.55)
    return np.asarray(np.clip(np.sqrt(toned) * 255 + 0.5, 0, 255), np.uint8)


def _palette() -> list[int]:
    fixed = [150, 190, 230, 120, 130, 150, 150, 140, 90]
    for number in range(len(THINGS)):
        angle = 2 * math.pi * number / len(THINGS)
        fixed += [round(127 + 110 * math.cos(angle + shift)) for shift in (0.0, 2.1, 4.2)]
    return fixed
