"""What tests of pictures share: the figures that are drawn, and the texts in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, in order; the files are written all the same."""
    found: list[Figure] = []
    savefig = Figure.savefig

    def note(figure: Figure, out: str | Path, **options: Any) -> None:
        found.append(figure)
        savefig(figure, out, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return found


def texts_of(figure: Figure) -> list[Text]:
    """Every text of a figure that is not empty, wherever it stands."""
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def words_of(figure: Figure) -> str:
    """What is written in a figure, a text a line."""
    return "\n".join(text.get_text() for text in texts_of(figure))
