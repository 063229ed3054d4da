"""A picture: weather, land and light that go together, one thing in front and others around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from corpus import texture as t
from corpus.render import Brush, Canvas, Colour, Floats, Light, Paint, Place
from corpus.things import HEIGHTS, THINGS, near, times

LABELS = ("sky", "hills", "ground", *THINGS)
"""Names of the segmentation labels; a label map holds their positions in this tuple."""
SUPERSAMPLING = 1.5
"""Pixels are drawn this much denser than the picture and averaged, which softens edges."""


@dataclass(frozen=True)
class Season:
    """Colours that belong together."""

    zenith: Colour
    horizon: Colour
    sun: Colour
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
    dice = Random(f"{seed}/{picture}")
    season = dice.choice((SEASONS[0], *SEASONS))  # summer is the most common
    canvas, places = _stage(kind, season, round(side * SUPERSAMPLING), dice)
    _sky(canvas, season, dice)
    canvas.ground(_ground(season, dice), LABELS.index("ground"), lambda points: _shadows(canvas, places, points))
    for place in sorted(places, key=lambda place: -place.z):
        THINGS[LABELS[place.label]](Brush(canvas, place), dice)
    linear = canvas.colour * dice.uniform(0.85, 1.1)
    toned = linear / (1 + np.maximum(linear - 0.6, 0) * 0.55)  # a soft shoulder in place of clipped highlights
    colours = np.clip(np.sqrt(toned) * 255 + 0.5, 0, 255).astype(np.uint8)
    labels = Image.fromarray(canvas.label, "P").resize((side, side), Image.Resampling.NEAREST)
    labels.putpalette(_palette())
    return Image.fromarray(colours, "RGB").resize((side, side), Image.Resampling.BOX), labels


def _stage(kind: str, season: Season, side: int, dice: Random) -> tuple[Canvas, list[Place]]:
    """The empty picture, and where things stand: ``kind`` in front, up to nine others behind it."""
    size, spread, fill = dice.uniform(0.85, 1.3), dice.uniform(0.45, 0.62), dice.uniform(0.42, 0.85)
    z = max(1.7, HEIGHTS[kind] * size / (2 * spread * fill))
    foot = dice.uniform(min(fill + 0.05, 0.9), 0.95)  # share of the picture above the foot of the thing in front
    horizon = dice.uniform(0.2, min(0.6, foot - 0.1))
    elevation, azimuth = dice.uniform(*season.elevation), dice.uniform(-2.4, 2.4)
    # Azimuth 0 is behind the viewer, who then sees the lit side of things.
    flat = math.cos(elevation)
    towards_sun = (flat * math.sin(azimuth), math.sin(elevation), -flat * math.cos(azimuth))
    r, g, b = t.mix(season.zenith, season.horizon, np.float32(0.5)).tolist()
    sky = (0.22 + 0.25 * r, 0.22 + 0.25 * g, 0.22 + 0.25 * b)
    light = Light(towards_sun, season.sun, sky, season.horizon, dice.uniform(35, 120))
    canvas = Canvas(side, spread, horizon, (foot - horizon) * 2 * spread * z, light)
    places = [Place(dice.uniform(-0.45, 0.45) * spread * z, z, size, season.leaves, LABELS.index(kind))]
    # Woods and villages: a scene's other things are mostly of two kinds.
    around = dice.choices(list(THINGS), k=2)
    for _ in range(dice.randint(2, 9)):
        z = places[0].z + 0.7 + 9 * dice.random() ** 1.5
        x, size = dice.uniform(-1.1, 1.1) * spread * z, dice.uniform(0.7, 1.3)
        name = dice.choice(around if dice.random() < 0.75 else list(THINGS))
        if all(math.hypot(x - other.x, z - other.z) > 0.5 * (size + other.size) for other in places):
            places.append(Place(x, z, size, season.leaves, LABELS.index(name)))
    return canvas, places


def _sky(canvas: Canvas, season: Season, dice: Random) -> None:
    """Sky, clouds and two ranges of hills: everything without distance."""
    above = np.maximum(canvas.up, 0)[:, None]
    across = canvas.across[None, :]
    colours = t.mix(season.horizon, season.zenith, np.broadcast_to(1 - np.exp(-above / 0.28), canvas.label.shape))
    shift, density = dice.uniform(0, 500), max(0, dice.uniform(-0.1, 0.75))
    flat = 34 / (above + 0.12)
    cloud = t.sample(1.3, across * flat + shift, flat + shift)
    share = np.clip((cloud - (1 - density)) * 3, 0, 0.9) * np.clip(above * 12, 0, 1)
    colours = t.mix(colours, near(dice, (0.95, 0.94, 0.95), 0.06), share)
    for layer in range(2):
        height, span = dice.uniform(0.05, 0.34) * (1.2 - 0.6 * layer), dice.uniform(60, 160) * (1 + layer)
        shift, columns = dice.uniform(0, 500), np.arange(-200, 200)
        outline = np.interp(across * span, columns, height * t.sample(2.0, columns + shift, columns * 0 + shift))
        hidden = (above < outline) & (above > 0)
        grain = t.sample(0.7, across * 300 + shift, above * 500)
        hills = t.mix(season.hills, season.horizon, np.clip(0.425 - 0.35 * layer + 0.25 * grain, 0, 1))
        colours[hidden] = hills[hidden]
        canvas.label[hidden] = LABELS.index("hills")
    canvas.colour[:] = colours


def _ground(season: Season, dice: Random) -> Paint:
    kind, shift = dice.choice(season.ground), dice.uniform(0, 500)
    if kind == "tiles":
        stone = near(dice, dice.choice(((0.72, 0.68, 0.60), (0.62, 0.40, 0.28), (0.52, 0.56, 0.62))), 0.2)
        return t.tiles(stone, near(dice, times(stone, 0.6)), dice.uniform(0.4, 0.9), dice.uniform(0, 1.5))
    if kind == "waves":
        water = t.mix(season.zenith, (0.04, 0.20, 0.26), np.float32(0.5))
        return t.waves(water, t.mix(water, season.horizon, np.float32(0.45)), shift)
    dark, bright = (near(dice, colour) for colour in season.land)
    return t.meadow(dark, bright, season.flower, dice.choice((0.0, 0.02, 0.05)), shift)


def _shadows(canvas: Canvas, places: list[Place], points: Floats) -> Floats:
    """The share of light at points ``(n, 3)`` of the ground: a thing's shadow is a long spot away from the sun."""
    x, y, z = canvas.light.direction
    away = -x / math.hypot(x, z), -z / math.hypot(x, z)
    light = np.ones(len(points), np.float32)
    for place in places:
        length = HEIGHTS[LABELS[place.label]] * place.size * math.hypot(x, z) / y
        dx, dz = points[:, 0] - place.x, points[:, 2] - place.z
        along = np.clip(dx * away[0] + dz * away[1], 0, length)
        beside = np.hypot(dx - along * away[0], dz - along * away[1])
        light = np.minimum(light, np.clip(beside * (4 / (0.3 * place.size)) - 3, 0.45, 1))
    return light


def _palette() -> list[int]:
    things = [2 * math.pi * number / len(THINGS) for number in range(len(THINGS))]
    colours = [round(127 + 110 * math.cos(angle + shift)) for angle in things for shift in (0.0, 2.1, 4.2)]
    return [150, 190, 230, 120, 130, 150, 150, 140, 90, *colours]
