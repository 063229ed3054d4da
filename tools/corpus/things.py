"""The ten things a picture can show, each drawn from a few painted solids standing on the ground."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random

from corpus import texture as t
from corpus.render import Brush, Colour, Paint, Vector

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
_COAL: Colour = (0.03, 0.03, 0.04)
_WALLS: tuple[Colour, ...] = ((0.85, 0.78, 0.62), (0.78, 0.45, 0.32), (0.62, 0.68, 0.72), (0.86, 0.86, 0.82))
_ROOFS: tuple[Colour, ...] = ((0.48, 0.12, 0.08), (0.20, 0.16, 0.17), (0.32, 0.19, 0.10), (0.14, 0.24, 0.32))
_STONES: tuple[Colour, ...] = ((0.55, 0.52, 0.47), (0.70, 0.58, 0.42), (0.45, 0.46, 0.50))
_GEMS: tuple[Colour, ...] = ((0.25, 0.55, 0.75), (0.55, 0.25, 0.70), (0.20, 0.65, 0.45), (0.85, 0.45, 0.55))


def near(dice: Random, colour: Colour, spread: float = 0.15) -> Colour:
    """A colour like the given one: brighter or darker, and a little of another hue."""
    shade = dice.uniform(1 - spread, 1 + spread)
    r, g, b = (min(1.0, c * shade * dice.uniform(1 - spread / 2, 1 + spread / 2)) for c in colour)
    return r, g, b


def times(colour: Colour, factor: float) -> Colour:
    """A darker or brighter colour."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def ball(brush: Brush, dice: Random) -> None:
    first, second = dice.choice(BRIGHT), dice.choice((_WHITE, *BRIGHT))
    paints = [
        t.plain(near(dice, first)),
        t.gores([first, second, _WHITE], 6),
        t.stripes(first, second, dice.uniform(2, 4)),
        t.dots(first, _WHITE, 5),
    ]
    brush.ball((0, 0.42, 0), (0.42, 0.42, 0.42), dice.choice(paints), 0.6)


def balloon(brush: Brush, dice: Random) -> None:
    first, second = dice.choice(BRIGHT), dice.choice((_WHITE, *BRIGHT))
    cloth = t.gores([first, second], dice.choice((10, 12, 16)))
    if dice.random() < 0.3:
        cloth = t.stripes(first, _WHITE, 3)
    up = dice.uniform(0.35, 0.8)
    brush.cone((0, up, 0), 0.14, 0.09, 0.1, t.stripes((0.45, 0.28, 0.12), (0.30, 0.17, 0.07), 30))
    brush.cone((0, up + 0.2, 0), 0.25, 0.11, 0.3, t.plain(near(dice, first)))
    brush.ball((0, up + 0.78, 0), (0.45, 0.5, 0.45), cloth, 0.2)


def cactus(brush: Brush, dice: Random) -> None:
    green, high = near(dice, (0.14, 0.36, 0.14)), dice.uniform(0.9, 1.2)
    ribs = t.gores([green, times(green, 1.5)], 22)
    brush.ball((0, high, 0), (0.14, 0.14, 0.14), ribs)
    brush.cone((0, 0, 0), high, 0.15, 0.14, ribs)
    for side in (-1, 1):
        foot, reach, arm = dice.uniform(0.35, 0.6), side * dice.uniform(0.28, 0.36), dice.uniform(0.25, 0.45)
        brush.ball((reach / 2, foot, 0), (abs(reach) / 2 + 0.07, 0.08, 0.08), ribs)
        brush.ball((reach, foot + arm, 0), (0.08, 0.08, 0.08), ribs)
        brush.cone((reach, foot, 0), arm, 0.085, 0.08, ribs)
    if dice.random() < 0.5:
        brush.ball((0, high + 0.15, 0), (0.08, 0.06, 0.08), t.plain(near(dice, (0.9, 0.3, 0.5))))


def crystal(brush: Brush, dice: Random) -> None:
    hue = near(dice, dice.choice(_GEMS))
    for side in (*dice.sample((-1, 1), 2), 0):  # the tallest last: it stands in front
        x, z, wide = side * dice.uniform(0.2, 0.32), 0.15 * abs(side), dice.uniform(0.14, 0.22)
        high, lean = dice.uniform(0.38, 0.55) * (1 if side else 1.5), side * dice.uniform(0.1, 0.3)
        up, tip = (lean, high, 0.0), (x + 1.4 * lean, 1.6 * high, z)
        glassy = t.mottled(hue, near(dice, _WHITE), 25, dice.uniform(0, 500))
        first = dice.uniform(0, 1)
        turns = [first + number * math.pi / 3 for number in range(7)]
        ring = [(x + wide * math.cos(turn), 0.0, z + wide * math.sin(turn)) for turn in turns]
        for left, right in pairwise(ring):
            shoulder = (left[0] + lean, high, left[2])
            brush.face(left, _minus(right, left), up, glassy)
            brush.face(shoulder, _minus(right, left), _minus(tip, shoulder), glassy, triangle=True)


def fir(brush: Brush, dice: Random) -> None:
    dark, shift = near(dice, (0.05, 0.20, 0.12)), dice.uniform(0, 500)
    needles = t.mottled(dark, times(dark, 2), 70, shift)
    if dice.random() < 0.25:
        needles = t.mottled(dark, _WHITE, 50, shift)
    brush.cone((0, 0, 0), 0.25, 0.07, 0.07, t.plain(_WOOD))
    tiers, width = dice.choice((3, 4)), dice.uniform(0.36, 0.5)
    for tier in range(tiers):
        brush.cone((0, 0.18 + 1.05 * tier / tiers, 0), 0.55, width * (1 - 0.75 * tier / tiers), 0, needles)


def house(brush: Brush, dice: Random) -> None:
    wide, deep, high = dice.uniform(0.38, 0.5), dice.uniform(0.3, 0.42), dice.uniform(0.56, 0.8)
    peak, turn = high + dice.uniform(0.25, 0.45), dice.uniform(-0.9, 0.9)
    wall, roof = near(dice, dice.choice(_WALLS)), near(dice, dice.choice(_ROOFS))
    plaster = t.plain(wall) if dice.random() < 0.6 else t.bricks(wall, (0.5, 0.47, 0.43), 0.07)
    door, tiled = near(dice, dice.choice(BRIGHT)), t.stripes(roof, near(dice, roof), 14)

    def turned(x: float, y: float, z: float) -> Vector:
        return x * math.cos(turn) - z * math.sin(turn), y, x * math.sin(turn) + z * math.cos(turn)

    for side in (1, -1):  # the far faces are not drawn
        x, z, over = side * wide, side * deep, 1.15
        side_wall = t.windows(plaster, _GLASS, 2 * wide / 3, 0.25, door if side == 1 else None)
        brush.face(turned(-x, 0, -z), turned(2 * x, 0, 0), (0, high, 0), side_wall)
        brush.face(turned(x, 0, -z), turned(0, 0, 2 * z), (0, high, 0), t.windows(plaster, _GLASS, deep, 0.25))
        brush.face(turned(x, high, -z), turned(0, 0, 2 * z), turned(0, peak - high, z), plaster, triangle=True)
        eaves, slope = turned(-x * over, high, -z * over), turned(0, peak - high, z * over)
        brush.face(eaves, turned(2 * x * over, 0, 0), slope, tiled)


def mushroom(brush: Brush, dice: Random) -> None:
    cap, cream = near(dice, dice.choice(BRIGHT[:3])), (0.85, 0.78, 0.64)
    wide, stem = dice.uniform(0.38, 0.55), dice.uniform(0.4, 0.6)
    paint = t.dots(cap, _WHITE, dice.uniform(3.5, 5)) if dice.random() < 0.8 else t.plain(cap)
    brush.cone((0, 0, 0), stem, 0.19, 0.13, t.plain(cream))
    brush.ball((0, stem, 0), (wide, dice.uniform(0.24, 0.38), wide), paint, 0.3)


def snowman(brush: Brush, dice: Random) -> None:
    snow, coal = t.plain((0.88, 0.90, 0.94)), t.plain(_COAL)
    lean, scarf = dice.uniform(-0.04, 0.04), t.plain(near(dice, dice.choice(BRIGHT)))
    brush.ball((0, 0.30, 0), (0.36, 0.33, 0.36), snow)
    brush.ball((lean, 0.75, 0), (0.26, 0.25, 0.26), snow)
    brush.cone((lean, 0.93, 0), 0.07, 0.19, 0.19, scarf)
    brush.ball((lean, 1.10, 0), (0.19, 0.19, 0.19), snow)
    for x, y in ((-0.075, 1.15), (0.065, 1.15), (0, 0.70), (0, 0.82)):
        brush.ball((lean + x, y, 0), (0.03, 0.03, 0.03), coal)
    brush.ball((lean - 0.03, 1.08, 0), (0.06, 0.035, 0.12), t.plain((0.9, 0.35, 0.04)))
    if dice.random() < 0.7:
        brush.cone((lean, 1.24, 0), 0.04, 0.22, 0.22, coal)
        brush.cone((lean, 1.27, 0), 0.20, 0.13, 0.13, coal)


def tower(brush: Brush, dice: Random) -> None:
    stone, tile = near(dice, dice.choice(_STONES)), near(dice, dice.choice(_ROOFS))
    high, wide = dice.uniform(1.0, 1.4), dice.uniform(0.2, 0.28)
    wall: Paint = t.bricks(stone, times(stone, 0.6), 0.075)
    if dice.random() < 0.35:
        wall = t.stripes(near(dice, BRIGHT[0]), _WHITE, 4)
    brush.cone((0, 0, 0), high, wide, wide * 0.85, t.windows(wall, _GLASS, 0.3, 0.25))
    brush.cone((0, high, 0), 0.09, wide * 1.15, wide * 1.15, t.plain(stone))
    brush.cone((0, high + 0.09, 0), dice.uniform(0.3, 0.5), wide * 1.2, 0, t.stripes(tile, near(dice, tile), 16))


def tree(brush: Brush, dice: Random) -> None:
    dark, bright = brush.place.leaves
    trunk = dice.uniform(0.45, 0.6)
    brush.cone((0, 0, 0), trunk + 0.2, 0.09, 0.06, t.mottled(_WOOD, (0.34, 0.22, 0.12), 40, 3))
    for _ in range(4):
        radius, x, y = dice.uniform(0.22, 0.36), dice.uniform(-0.24, 0.24), trunk + dice.uniform(0.15, 0.55)
        leaves = t.mottled(near(dice, dark), near(dice, bright), 60, dice.uniform(0, 500))
        brush.ball((x, y, 0), (radius, radius * 0.85, radius), leaves)


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


THINGS: dict[str, Callable[[Brush, Random], None]] = {
    draw.__name__: draw for draw in (ball, balloon, cactus, crystal, fir, house, mushroom, snowman, tower, tree)
}
"""What each class of picture shows in front, in the order of the class numbers."""
HEIGHTS = dict(zip(THINGS, (0.84, 1.8, 1.2, 1.0, 1.5, 1.0, 0.85, 1.4, 1.7, 1.35), strict=True))
"""How tall a thing of size 1 is, about: the viewer is placed by it."""
