"""Text in pictures: in the characters that its font has, and in the room that there is."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from beit_dist.errors import printable

_GAP, _LARGE = "…", 200


def drawable(text: str) -> str:
    """``text`` with its line breaks, and escapes for characters that cannot be drawn: else they would be boxes."""
    known = _characters()
    return "".join(
        each if each == "\n" or (each.isprintable() and ord(each) in known) else _escaped(each) for each in text
    )


def shortened(name: str, most: int) -> str:
    """``name`` in up to ``most`` characters, without its middle where it is longer: both ends tell names apart."""
    name = drawable(printable(name))
    return name if len(name) <= most else _cut(name, most)


def fitted(name: str, room: float, size: int) -> str:
    """``name`` in one line of a width, without its middle where it is wider.

    Args:
        room: the width, in the unit of ``size``.
        size: of the letters.
    """
    name = drawable(printable(name))
    kept, shown = len(name), name
    while kept > 1 and width(shown, size) > room:
        kept -= 1
        shown = _cut(name, kept)
    return shown


def width(text: str, size: int) -> float:
    """Of a line, in the unit of ``size``. A small font would be measured in whole pixels."""
    return font(_LARGE).getlength(text) * size / _LARGE


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's, which is the same everywhere."""
    return ImageFont.truetype(str(_file()), size)


@cache
def _characters() -> frozenset[int]:
    return frozenset(FT2Font(str(_file())).get_charmap())


def _file() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _cut(name: str, most: int) -> str:
    head = (most - 1) // 2
    return f"{name[:head]}{_GAP}{name[len(name) - (most - 1 - head) :]}"
