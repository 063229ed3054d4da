"""Charts put numbers where they belong, keep what stands out, and leave gaps where there is none."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from beit_dist.reports.html.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Level, Line, draw, short


def chart(values: list[float], style: str = "smooth", **options: object) -> Chart | None:
    at = np.arange(1.0, len(values) + 1)
    return draw("T", [Line(at, np.array(values), style, 0)], along="step", summary="", **options)  # type: ignore[arg-type]


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_a_line_goes_from_the_left_edge_to_the_right_one_and_up_for_larger_values() -> None:
    drawn = chart([1.0, 2.0, 3.0])
    assert drawn is not None
    (first, middle, last) = places(drawn.lines[0].path)
    assert (first[0], last[0]) == (LEFT, WIDTH - RIGHT)
    assert middle[0] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)
    assert HEIGHT - BOTTOM > first[1] > middle[1] > last[1] > TOP


def test_a_number_that_is_not_finite_leaves_a_gap() -> None:
    drawn = chart([1.0, 2.0, math.nan, 2.0, 1.0])
    assert drawn is not None
    assert drawn.lines[0].path.count("M") == 2
    assert len(places(drawn.lines[0].path)) == 4


def test_without_a_finite_number_there_is_no_chart() -> None:
    assert chart([math.nan, math.nan]) is None
    assert draw("T", [], along="step", summary="") is None


def test_a_single_step_is_a_dot() -> None:
    drawn = chart([2.0])
    assert drawn is not None
    ((x, _, said),) = drawn.lines[0].dots
    assert (x, said) == ((LEFT + WIDTH - RIGHT) / 2, "step 1: 2")


def test_a_long_line_is_thinned_and_keeps_its_spike() -> None:
    values = [1.0 + 0.001 * (step % 7) for step in range(100_000)]
    values[54_321] = 5.0
    drawn = chart(values, "raw", span=(0, 100_001))
    assert drawn is not None
    found = places(drawn.lines[0].path)
    assert len(found) <= 300
    assert min(y for _, y in found) < TOP  # it is there, beyond the range that single steps do not stretch


def test_baselines_are_within_the_range() -> None:
    drawn = chart([1.0, 1.1], levels=[Level(9.0, "uniform", 0)])
    assert drawn is not None
    ((height, level),) = drawn.levels
    assert TOP < height < HEIGHT / 2
    assert level.label == "uniform"


def test_percent_begins_at_0_and_ticks_say_so() -> None:
    drawn = chart([40.0, 50.0], percent=True)
    assert drawn is not None
    assert drawn.upwards[0].text == "0%"
    assert drawn.upwards[0].at == pytest.approx(HEIGHT - BOTTOM)


def test_a_logarithmic_scale_has_powers_of_ten_at_equal_distances() -> None:
    drawn = chart([0.1, 1.0, 10.0, 1000.0], log=True)
    assert drawn is not None
    assert [tick.text for tick in drawn.upwards] == ["0.1", "1", "10", "100", "1,000"]
    gaps = np.diff([tick.at for tick in drawn.upwards])
    assert np.ptp(gaps) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (12_000, "12,000"),
        (4e-5, "4e-5"),
        (7.5e-4, "7.5e-4"),
        (2.5e6, "2.5 M"),
        (-1.5, "-1.5"),
    ],
)
def test_numbers_on_an_axis_are_short(value: float, text: str) -> None:
    assert short(value) == text
