"""Names of files and runs as pictures show them: in the room there is, and without anything acted on."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from beit_dist.lettering import drawable, fitted


def file_name(source: str, room: float, size: int) -> str:
    """A sample's source in one line of width ``room``, as :func:`fitted` has it: with its folders if they fit."""
    whole = fitted(source, room, size)
    return whole if whole == drawable(source) else fitted(source.rpartition("/")[2], room, size)


def verbatim(text: Text) -> None:
    """Draw a text as it is: a ``$`` is a ``$``, and begins no formula."""
    text.set_parse_math(False)
    text.set_text(drawable(text.get_text()))


def save(figure: Figure, out: str | Path) -> None:
    """Write a figure, and the folder around it."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
