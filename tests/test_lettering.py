"""Names in pictures: every character can be read, and each fits in one line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from beit_dist.lettering import drawable, fitted, shortened, width
from beit_dist.reports.names import file_name, save, verbatim


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("détail n01440764.jpg", "détail n01440764.jpg"),
        ("東京.jpg", r"\u6771\u4eac.jpg"),
        ("Ω 🍄", r"Ω \U0001f344"),
        ("two\nlines", "two\nlines"),
        ("a\tb", r"a\tb"),
    ],
)
def test_what_the_font_lacks_is_written_as_its_code(name: str, shown: str) -> None:
    assert drawable(name) == shown


@pytest.mark.parametrize("name", ["mushroom/000606.jpg", "WWWWWWWWWWWWWWWWWWWWWWW.jpg", "東京の写真 0123.jpg"])
def test_a_name_fits_in_its_room_and_keeps_its_end(name: str) -> None:
    shown = fitted(name, 60, 8)
    assert width(shown, 8) <= 60
    assert "…" in shown
    assert shown.endswith(".jpg")
    assert "\n" not in shown
    longer = drawable(name)[: len(shown)]
    assert width(longer, 8) > 0.8 * 60  # no more is left out than must be


def test_folders_are_shown_where_they_fit() -> None:
    assert file_name("mushroom/000606.jpg", 200, 8) == "mushroom/000606.jpg"
    assert file_name("mushroom/000606.jpg", 60, 8) == "000606.jpg"
    assert shortened("0123456789", 5) == "01…89"


def test_no_picture_holds_a_box_in_place_of_a_character(tmp_path: Path) -> None:
    figure = Figure()
    verbatim(figure.suptitle("東京 $x_1$"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each character that its font lacks
        save(figure, tmp_path / "a.png")
