"""The ten things a picture can show, each built from a few painted solids standing on the ground."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from beit_dist.data.corpus import texture as t
from beit_dist.data.corpus.render import Convex, Ellipsoid, Frustum, Paint, Part, Vector
from beit_dist.data.corpus.texture import Colour
from beit_dist.data.draws import Purpose, uniforms, words

Choice = TypeVar("Choice")

_DRAWS = 2048


class Dice:
    """The random numbers of one picture: a function of seed and picture, used up one by one."""

    def __init__(self, seed: int, picture: int) -> None:
        numbers: list[float] = uniforms(words(seed, Purpose.CORPUS, (1, picture), _DRAWS)).tolist()
        self._numbers = iter(numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def chance(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def pick(self, choices: Sequence[Choice]) -> Choice:
        return choices[int(next(self._numbers) * len(choices))]

    def near(self, colour: Colour, spread: float = 0.15) -> Colour:
        """A colour like the given one: brighter or darker, and a little of another hue."""
        shade = self.between(1 - spread, 1 + spread)
        r, g, b = (min(1.0, c * shade * self.between(1 - spread / 2, 1 + spread / 2)) for c in colour)
        return r, g, b


@dataclass(frozen=True)
class Place:
    """Where a thing stands, how big it is, and the colours of leaves in this picture's season."""

    x: float
    z: float
    size: float
    leaves: tuple[Colour, Colour]
    label: int

    def at(self, dx: float, y: float, dz: float) -> Vector:
        """A point given in sizes from the thing's foot."""
        return self.x + dx * self.size, y * self.size, self.z + dz * self.size

    def ellipsoid(self, at: Vector, radii: Vector, paint: Paint, shine: float = 0.0) -> Part:
        scaled = (radii[0] * self.size, radii[1] * self.size, radii[2] * self.size)
        return Part(Ellipsoid(self.at(*at), scaled), paint, self.label, shine)

    def frustum(
        self, at: Vector, height: float, bottom: float, top: float, paint: Paint, shine: float = 0.0
    ) -> Part:
        s = self.size
        return Part(Frustum(self.at(*at), height * s, bottom * s, top * s), paint, self.label, shine)

    def convex(
        self, at: Vector, planes: Sequence[tuple[Vector, float]], radius: float, turn: float, paint: Paint
    ) -> Part:
        solid = Convex(
            self.at(*at),
            tuple(normal for normal, _ in planes),
            tuple(offset * self.size for _, offset in planes),
            radius * self.size,
            turn,
        )
        return Part(solid, paint, self.label, 0.15)


BRIGHT: tuple[Colour, ...] = (
    (0.80, 0.08, 0.07),
    (0.92, 0.42, 0.04),
    (0.93, 0.72, 0.06),
    (0.16, 0.50, 0.12),
    (0.06, 0.32, 0.68),
    (0.40, 0.12, 0.52),
    (0.88, 0.30, 0.48),
    (0.05, 0.52, 0.52),
)
_WHITE: Colour = (0.9, 0.9, 0.88)
_WOOD: Colour = (0.22, 0.12, 0.06)
_GLASS: Colour = (0.10, 0.16, 0.24)
_WALLS: tuple[Colour, ...] = ((0.85, 0.78, 0.62), (0.78, 0.45, 0.32), (0.62, 0.68, 0.72), (0.86, 0.86, 0.82))
_ROOFS: tuple[Colour, ...] = ((0.48, 0.12, 0.08), (0.20, 0.16, 0.17), (0.32, 0.19, 0.10), (0.14, 0.24, 0.32))


def ball(place: Place, dice: Dice) -> list[Part]:
    first, second = dice.pick(BRIGHT), dice.pick((_WHITE, *BRIGHT))
    paint = dice.pick(
        [
            t.plain(dice.near(first)),
            t.gores([first, second, _WHITE], 6),
            t.stripes(first, second, dice.between(2, 4), 1),
            t.dots(first, _WHITE, 5),
        ]
    )
    radius = 0.42
    return [place.ellipsoid((0, radius, 0), (radius, radius, radius), paint, 0.6)]


def house(place: Place, dice: Dice) -> list[Part]:
    wide, deep, high = dice.between(0.38, 0.5), dice.between(0.3, 0.42), dice.between(0.28, 0.4)
    roof, turn = dice.between(0.25, 0.45), dice.between(-0.9, 0.9)
    wall = dice.near(dice.pick(_WALLS))
    plaster = t.plain(wall) if dice.chance(0.6) else t.bricks(wall, (0.5, 0.47, 0.43), 0.07 * place.size)
    door = dice.pick(BRIGHT)
    front = t.windows(plaster, _GLASS, 0.32 * place.size, -high * 0.55 * place.size, dice.near(door))
    body = _box(wide, high, deep)
    tiled = t.stripes(roofing := dice.near(dice.pick(_ROOFS)), dice.near(roofing), 14 / place.size, 1)
    slant = math.hypot(roof, deep + 0.06)
    n = (0.0, (deep + 0.06) / slant, roof / slant)
    gable: list[tuple[Vector, float]] = [
        (n, roof * n[1]),
        ((0.0, n[1], -n[2]), roof * n[1]),
        ((0.0, -1.0, 0.0), 0.0),
        ((1.0, 0.0, 0.0), wide + 0.05),
        ((-1.0, 0.0, 0.0), wide + 0.05),
    ]
    return [
        place.convex((0, high, 0), body, math.hypot(wide, math.hypot(high, deep)), turn, front),
        place.convex((0, 2 * high, 0), gable, math.hypot(wide + 0.05, deep + roof), turn, tiled),
    ]


def tree(place: Place, dice: Dice) -> list[Part]:
    dark, bright = place.leaves
    trunk = dice.between(0.45, 0.6)
    parts = [place.frustum((0, 0, 0), trunk + 0.2, 0.09, 0.06, t.mottled(_WOOD, (0.34, 0.22, 0.12), 40, 3))]
    for _ in range(4):
        radius = dice.between(0.22, 0.36)
        at = (dice.between(-0.24, 0.24), trunk + dice.between(0.15, 0.55), dice.between(-0.2, 0.2))
        leaves = t.mottled(dice.near(dark), dice.near(bright), 60, dice.between(0, 500))
        parts.append(place.ellipsoid(at, (radius, radius * 0.85, radius), leaves))
    return parts


def fir(place: Place, dice: Dice) -> list[Part]:
    dark: Colour = dice.near((0.05, 0.20, 0.12))
    needles = t.mottled(dark, (dark[0] * 2, dark[1] * 2, dark[2] * 1.8), 70, dice.between(0, 500))
    if dice.chance(0.25):
        needles = t.mottled(dark, _WHITE, 50, dice.between(0, 500))
    parts = [place.frustum((0, 0, 0), 0.25, 0.07, 0.07, t.plain(_WOOD))]
    tiers, width = 3 + dice.chance(0.5), dice.between(0.36, 0.5)
    for tier in range(tiers):
        share = 1 - 0.75 * tier / tiers
        parts.append(place.frustum((0, 0.18 + 1.05 * tier / tiers, 0), 0.55, width * share, 0.0, needles))
    return parts


def mushroom(place: Place, dice: Dice) -> list[Part]:
    cap = dice.near(dice.pick(BRIGHT[:3]))
    wide, stem = dice.between(0.38, 0.55), dice.between(0.4, 0.6)
    cream = (0.85, 0.78, 0.64)
    paint = t.dots(cap, _WHITE, dice.between(3.5, 5)) if dice.chance(0.8) else t.plain(cap)
    return [
        place.frustum((0, 0, 0), stem, 0.19, 0.13, t.plain(cream)),
        place.ellipsoid((0, stem, 0), (wide, dice.between(0.24, 0.38), wide), paint, 0.3),
        place.frustum((0, stem - 0.2, 0), 0.12, 0.15, wide * 0.75, t.stripes(cream, (0.6, 0.5, 0.4), 18, 0)),
    ]


def crystal(place: Place, dice: Dice) -> list[Part]:
    hue = dice.near(dice.pick(((0.25, 0.55, 0.75), (0.55, 0.25, 0.70), (0.20, 0.65, 0.45), (0.85, 0.45, 0.55))))
    parts = []
    for number in range(3):
        wide, high = dice.between(0.13, 0.2), dice.between(0.5, 0.75) * (1.0 if number == 0 else 0.6)
        lean = 0.0 if number == 0 else dice.between(0.2, 0.45)
        planes: list[tuple[Vector, float]] = []
        for side in range(6):
            x, z = math.cos(side * math.pi / 3), math.sin(side * math.pi / 3)
            tip = math.hypot(1, 0.55)
            planes.append(((x * math.cos(lean), -math.sin(lean) * x, z), wide))
            planes.append(((x / tip, 0.55 / tip, z / tip), (0.55 * high) / tip))
        planes.append(((0.0, -1.0, 0.0), high * 0.9))
        at = (0.0, high * 0.6, 0.0)
        if number:
            at = ((-1) ** number * dice.between(0.2, 0.32), high * 0.6, dice.between(-0.25, 0.1))
        glassy = t.mottled(hue, dice.near(_WHITE), 25, dice.between(0, 500))
        parts.append(place.convex(at, planes, high * 1.2, dice.between(0, 1), glassy))
    return parts


def snowman(place: Place, dice: Dice) -> list[Part]:
    snow = t.plain((0.88, 0.90, 0.94), 0.06)
    coal, scarf = t.plain((0.03, 0.03, 0.04)), t.plain(dice.near(dice.pick(BRIGHT)))
    lean = dice.between(-0.04, 0.04)
    parts = [
        place.ellipsoid((0, 0.30, 0), (0.36, 0.33, 0.36), snow),
        place.ellipsoid((lean, 0.75, 0), (0.26, 0.25, 0.26), snow),
        place.ellipsoid((lean, 1.10, 0), (0.19, 0.19, 0.19), snow),
        place.frustum((lean, 0.93, 0), 0.07, 0.19, 0.19, scarf),
        place.ellipsoid((lean - 0.03, 1.09, -0.24), (0.035, 0.035, 0.12), t.plain((0.9, 0.35, 0.04))),
    ]
    parts += [place.ellipsoid((lean + x, 1.15, -0.17), (0.03, 0.03, 0.03), coal) for x in (-0.075, 0.065)]
    parts += [place.ellipsoid((lean, y, -0.25), (0.03, 0.03, 0.03), coal) for y in (0.70, 0.82)]
    if dice.chance(0.7):
        parts.append(place.frustum((lean, 1.24, 0), 0.04, 0.22, 0.22, coal))
        parts.append(place.frustum((lean, 1.27, 0), 0.20, 0.13, 0.13, coal))
    return parts


def tower(place: Place, dice: Dice) -> list[Part]:
    stone = dice.near(dice.pick(((0.55, 0.52, 0.47), (0.70, 0.58, 0.42), (0.45, 0.46, 0.50))))
    high, wide = dice.between(1.0, 1.4), dice.between(0.2, 0.28)
    wall = t.bricks(stone, (stone[0] * 0.6, stone[1] * 0.6, stone[2] * 0.6), 0.075 * place.size)
    if dice.chance(0.35):
        wall = t.stripes(dice.near(BRIGHT[0]), _WHITE, 4 / place.size, 1)
    wall = t.windows(wall, _GLASS, 0.3 * place.size, 0.25 * place.size)
    roof = t.stripes(tile := dice.near(dice.pick(_ROOFS)), dice.near(tile), 16 / place.size, 1)
    return [
        place.frustum((0, 0, 0), high, wide, wide * 0.85, wall),
        place.frustum((0, high, 0), 0.09, wide * 1.15, wide * 1.15, t.plain(stone)),
        place.frustum((0, high + 0.09, 0), dice.between(0.3, 0.5), wide * 1.2, 0.0, roof),
    ]


def cactus(place: Place, dice: Dice) -> list[Part]:
    green = dice.near((0.14, 0.36, 0.14))
    ribs = t.gores([green, (green[0] * 1.5, green[1] * 1.45, green[2] * 1.4)], 22)
    high = dice.between(0.9, 1.2)
    parts = [
        place.frustum((0, 0, 0), high, 0.15, 0.14, ribs),
        place.ellipsoid((0, high, 0), (0.14, 0.14, 0.14), ribs),
    ]
    for side in (-1, 1):
        foot, reach, arm = dice.between(0.35, 0.6), side * dice.between(0.28, 0.36), dice.between(0.25, 0.45)
        parts += [
            place.ellipsoid((reach / 2, foot, 0), (abs(reach) / 2 + 0.07, 0.08, 0.08), ribs),
            place.frustum((reach, foot, 0), arm, 0.085, 0.08, ribs),
            place.ellipsoid((reach, foot + arm, 0), (0.08, 0.08, 0.08), ribs),
        ]
    if dice.chance(0.5):
        bloom = t.plain(dice.near((0.9, 0.3, 0.5)))
        parts.append(place.ellipsoid((0, high + 0.15, 0), (0.08, 0.06, 0.08), bloom))
    return parts


def balloon(place: Place, dice: Dice) -> list[Part]:
    first, second = dice.pick(BRIGHT), dice.pick(BRIGHT)
    cloth = t.gores([first, second if dice.chance(0.5) else _WHITE], dice.pick((10, 12, 16)))
    if dice.chance(0.3):
        cloth = t.stripes(first, _WHITE, 3, 1)
    up = dice.between(0.35, 0.8)
    basket = t.stripes((0.45, 0.28, 0.12), (0.30, 0.17, 0.07), 30 / place.size, 1)
    return [
        place.ellipsoid((0, up + 0.78, 0), (0.45, 0.5, 0.45), cloth, 0.2),
        place.frustum((0, up + 0.2, 0), 0.22, 0.11, 0.3, t.plain(dice.near(first))),
        place.convex((0, up + 0.04, 0), _box(0.1, 0.07, 0.1), 0.16, dice.between(0, 1), basket),
    ]


def _box(wide: float, high: float, deep: float) -> list[tuple[Vector, float]]:
    return [
        ((1.0, 0.0, 0.0), wide),
        ((-1.0, 0.0, 0.0), wide),
        ((0.0, 1.0, 0.0), high),
        ((0.0, -1.0, 0.0), high),
        ((0.0, 0.0, 1.0), deep),
        ((0.0, 0.0, -1.0), deep),
    ]


THINGS: dict[str, Callable[[Place, Dice], list[Part]]] = {
    build.__name__: build for build in (ball, balloon, cactus, crystal, fir, house, mushroom, snowman, tower, tree)
}
"""What each class of picture shows in front, in the order of the class numbers."""
HEIGHTS = dict(zip(THINGS, (0.84, 1.8, 1.2, 1.0, 1.5, 1.0, 0.85, 1.4, 1.7, 1.35), strict=True))
"""How tall a thing of size 1 is, about: the camera is placed by it."""
