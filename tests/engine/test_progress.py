"""The progress line fits its terminal, shows baselines, and leaves a history that thins out."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from beit_dist.engine import progress
from beit_dist.engine.progress import Pace, ProgressLine, clock
from beit_dist.models.heads.tokens import TokensHead
from beit_dist.step_numbers import Baseline, Number

NUMBERS = (*TokensHead.numbers, Number(name="dead", help="Known.", text="dead {}"))
BASELINES = {
    "loss": [Baseline("uniform", 6.25), Baseline("frequency", 4.125)],
    "accuracy": [Baseline("commonest token", 0.055)],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def step(number: int, loss: float | None = 2.0, accuracy: float = 0.1, dead: int = 3) -> dict[str, Any]:
    return {"step": number, "epoch": number / 4, "loss": loss, "accuracy": accuracy, "dead": dead, "lr": 0.1}


def numbers_of(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"step (\d+)/", text)]


def test_lines_of_a_log_thin_out_and_mark_every_part_of_a_quick_run(clocked: Callable[[float], None]) -> None:
    slow, quick = io.StringIO(), io.StringIO()
    shown = ProgressLine(NUMBERS, {}, 100_000, out=slow)
    for number in range(1, 2001):
        shown.steps([step(number)], Pace(8.0, 0.0))
        clocked(1.0)
    stayed = numbers_of(slow.getvalue())
    assert stayed[:5] == [1, 2, 3, 4, 5]
    gaps = [later - sooner for sooner, later in itertools.pairwise(stayed)]
    assert gaps == sorted(gaps)
    assert 20 < len(stayed) < 50
    shown = ProgressLine(NUMBERS, {}, 100, out=quick)
    for number in range(1, 101):
        shown.steps([step(number)], Pace(8.0, 0.0))
    assert numbers_of(quick.getvalue()) == [1, *range(5, 101, 5)]


def test_a_terminal_keeps_a_line_up_to_date_and_leaves_a_history(clocked: Callable[[float], None]) -> None:
    out = Terminal()
    shown = ProgressLine(NUMBERS, {}, 100, out=out)
    for number in range(1, 31):
        shown.steps([step(number)], Pace(8.0, 0.0))
        clocked(1.0)
    text = out.getvalue()
    assert numbers_of(text) == list(range(1, 31))  # each was shown ...
    stayed = numbers_of("".join(line for line in text.split("\r") if line.endswith("\n")))
    assert stayed == [1, 6, 11, 16, 21, 26]  # ... and these have stayed
    assert not text.endswith("\n")
    shown.close()
    assert out.getvalue().endswith("\n")


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_a_line_fits_the_width_and_keeps_what_matters_most(
    columns: int, monkeypatch: pytest.MonkeyPatch, clocked: Callable[[float], None]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    shown = ProgressLine(NUMBERS, BASELINES, 1000, out=out)
    shown.steps([step(1)], Pace(8.0, 0.0))
    clocked(2.0)
    shown.steps([step(2)], Pace(1234.0, 0.2))
    shown.measured(2, TokensHead.numbers, step(2), BASELINES)
    lines = [line.removeprefix("\033[K").rstrip("\n") for line in out.getvalue().split("\r")[1:]]
    assert all(len(line) < columns for line in lines)
    assert lines[1].startswith("step 2/1000")
    expected = {
        20: [],
        60: ["loss 2.0000 (frequency 4.1250)", "33:16 left"],
        80: ["loss 2.0000 (frequency 4.1250)", "accuracy 10.0%", "33:16 left"],
        200: [
            "loss 2.0000 (frequency 4.1250)",
            "accuracy 10.0% (commonest token 5.5%)",
            "dead 3",
            "1234 images/s",
        ],
    }
    for wanted in expected[columns]:
        assert wanted in lines[1]
    if columns > 20:
        assert "step 2  held out  loss 2.0000 (frequency 4.1250)" in lines[2]
    assert ("data wait 20%" in lines[1]) == (columns == 200)
    assert "data wait" not in lines[0]


def test_loss_and_accuracy_are_means_of_the_steps_since_the_last_line(clocked: Callable[[float], None]) -> None:
    out = io.StringIO()
    shown = ProgressLine(NUMBERS, {}, 1_000_000, out=out)
    shown.steps([step(1)], Pace(8.0, 0.0))
    shown.steps([step(2, 2.0, 0.1), step(3, 4.0, 0.2)], Pace(8.0, 0.0))
    clocked(5.0)
    shown.steps([step(4, 6.0, 0.6, dead=7)], Pace(8.0, 0.0))
    last = out.getvalue().splitlines()[-1]
    assert "loss 4.0000  accuracy 30.0%  dead 7" in last
    clocked(5.0)
    shown.steps([step(5, None), step(6, 2.0)], Pace(8.0, 0.0))
    assert "loss not finite" in out.getvalue().splitlines()[-1]


def test_the_time_left_comes_from_all_steps_but_the_first(clocked: Callable[[float], None]) -> None:
    out = io.StringIO()
    shown = ProgressLine(NUMBERS, {}, 21, out=out)
    clocked(100.0)  # a slow first step
    shown.steps([step(1)], Pace(8.0, 0.0))
    assert "left" not in out.getvalue()
    clocked(10.0)
    shown.steps([step(number) for number in range(2, 12)], Pace(8.0, 0.0))
    clocked(20.0)  # a save in between counts
    shown.steps([step(12)], Pace(8.0, 0.0))
    assert [line.split()[-2] for line in out.getvalue().splitlines()[1:]] == ["0:10", "0:24"]


def test_no_progress_is_no_output() -> None:
    out = Terminal()
    shown = ProgressLine(NUMBERS, {}, 10, enabled=False, out=out)
    shown.steps([step(1)], Pace(8.0, 0.0))
    shown.measured(1, TokensHead.numbers, step(1), {})
    shown.close()
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00"), (75, "1:15"), (3661, "1:01:01"), (2 * 86400 + 3600, "2 d 1:00:00")]
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert clock(seconds) == said
